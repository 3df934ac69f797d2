"""Sampling options for single rows, chosen so that they change the row's token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from ops.world import World

# An option changes one row: the fields of SamplingState and RequestState, each of one request,
# ``vocab_size``, and ``likely``, ten token ids (fewer of a small vocabulary), likeliest first.
Option = Callable[[Any], None]


def greedy(row: Any) -> None:
    row.temperature.zero_()


def neutral(row: Any) -> None:
    pass


def cold(row: Any) -> None:
    row.temperature.fill_(1e-6)


def hot(row: Any) -> None:
    row.temperature.fill_(1e4)


def warm(row: Any) -> None:
    row.temperature.fill_(0.7)


def top_k(row: Any) -> None:
    row.top_k.clamp_(max=5)


def top_k_1(row: Any) -> None:
    row.top_k.fill_(1)


def top_k_most(row: Any) -> None:
    row.top_k.fill_(max(1, row.vocab_size - 1))


def top_p(row: Any) -> None:
    row.top_p.fill_(0.9503)


def small_top_p(row: Any) -> None:
    row.top_p.fill_(0.1003)


def tiny_top_p(row: Any) -> None:
    row.top_p.fill_(1e-6)


def min_p(row: Any) -> None:
    row.min_p.fill_(0.05)


def penalties(row: Any) -> None:
    """The likeliest token was sampled three times, the next one is in the prompt."""
    row.repetition_penalty.fill_(1.3)
    row.frequency_penalty.fill_(0.7)
    row.presence_penalty.fill_(-0.4)
    _seen(row)


def repetition(row: Any) -> None:
    row.repetition_penalty.fill_(0.6)
    _seen(row)


def repetition_huge(row: Any) -> None:
    row.repetition_penalty.fill_(1e6)
    _seen(row)


def repetition_tiny(row: Any) -> None:
    row.repetition_penalty.fill_(1e-6)
    _seen(row)


def frequency(row: Any) -> None:
    row.frequency_penalty.fill_(1.5)
    _seen(row)


def frequency_huge(row: Any) -> None:
    row.frequency_penalty.fill_(1e4)
    _seen(row)


def frequency_reward(row: Any) -> None:
    row.frequency_penalty.fill_(-1e4)
    _seen(row)


def presence(row: Any) -> None:
    row.presence_penalty.fill_(2.0)
    _seen(row)


def _seen(row: Any) -> None:
    row.output_bin_counts[0, row.likely[0]] += 3
    token = row.likely[1 % len(row.likely)]
    row.prompt_bin_mask[0, token // 32] |= torch.tensor(1 << token % 32).int()


def allowed(row: Any) -> None:
    """Unlikely tokens, in no order."""
    tokens = row.likely[:2:-1] or row.likely
    row.num_allowed_token_ids.fill_(len(tokens))
    row.allowed_token_ids[0, : len(tokens)] = torch.tensor(tokens).int()


def allowed_1024(row: Any) -> None:
    """Every third token, as many as fit."""
    tokens = torch.arange(0, row.vocab_size, 3)[:1024].flip(0)
    row.num_allowed_token_ids.fill_(len(tokens))
    row.allowed_token_ids[0, : len(tokens)] = tokens.int()


def logit_bias(row: Any) -> None:
    """Away from the likeliest token, towards two others."""
    tokens = row.likely[:1] + row.likely[5:7]
    row.num_logit_bias.fill_(len(tokens))
    row.logit_bias_token_ids[0, : len(tokens)] = torch.tensor(tokens).int()
    row.logit_bias[0, : len(tokens)] = torch.tensor([-100.0, 3.25, 4.5])[: len(tokens)]


def logit_bias_1024(row: Any) -> None:
    size = min(1024, row.vocab_size)
    row.num_logit_bias.fill_(size)
    row.logit_bias_token_ids[0, :size] = torch.arange(row.vocab_size - size, row.vocab_size).int()
    row.logit_bias[0, :size] = torch.sin(torch.arange(size)) * 9


def min_tokens(row: Any) -> None:
    """The two likeliest tokens would stop the request, which is too short."""
    _forbid_stop(row, row.likely[:2])


def min_tokens_128(row: Any) -> None:
    _forbid_stop(row, [*row.likely, *range(0, row.vocab_size, 7)][:128])


def min_tokens_reached(row: Any) -> None:
    """One token less and the stop tokens would be forbidden."""
    _forbid_stop(row, row.likely[:2])
    row.min_lens.copy_(row.total_len)


def _forbid_stop(row: Any, tokens: list[int]) -> None:
    row.min_lens.copy_(row.total_len + 1)
    row.num_min_stop_token_ids.fill_(len(tokens))
    row.min_stop_token_ids[0, : len(tokens)] = torch.tensor(tokens).int()


def bad_words(row: Any) -> None:
    """Words of one, two and three tokens that match; the others do not (see ``test_bad_words``)."""
    total_len, output_len = int(row.total_len), int(row.total_len - row.prompt_len)
    tokens = row.all_token_ids[0].tolist()[:total_len]
    other = [(token + 1) % row.vocab_size for token in tokens]
    likely = (row.likely * 10)[:10]
    words = [
        [likely[0]],
        [tokens[-1], likely[1]],
        [tokens[-2], tokens[-1], likely[2]],
        [*tokens[-output_len - 1 :], likely[3]],
        [other[-1], likely[4]],
        [other[-2], tokens[-1], likely[5]],
        [tokens[-2], other[-1], likely[6]],
        [tokens[-1]] * 60 + [likely[7]],
    ]
    ends = torch.tensor([0, *map(len, words)]).cumsum(0)
    row.num_bad_words.fill_(len(words))
    row.bad_word_offsets[0, : len(ends)] = ends.int()
    row.bad_word_token_ids[0, : ends[-1]] = torch.tensor(list(chain(*words))).int()


OPTIONS: list[Option] = [
    greedy,
    neutral,
    cold,
    hot,
    warm,
    top_k,
    top_k_1,
    top_k_most,
    top_p,
    small_top_p,
    tiny_top_p,
    min_p,
    penalties,
    repetition,
    repetition_huge,
    repetition_tiny,
    frequency,
    frequency_huge,
    frequency_reward,
    presence,
    allowed,
    allowed_1024,
    logit_bias,
    logit_bias_1024,
    min_tokens,
    min_tokens_128,
    min_tokens_reached,
    bad_words,
]
COMBINATIONS: list[tuple[Option, ...]] = [
    *((option,) for option in OPTIONS),
    (greedy, penalties, logit_bias, min_tokens, bad_words),
    (greedy, allowed, penalties),
    (greedy, top_k, small_top_p, min_p),
    (warm, top_k, top_p),
    (warm, min_p, top_k, top_p, penalties),
    (hot, top_k, small_top_p, bad_words, logit_bias),
    (hot, top_k_most, top_p),
    (cold, top_p, repetition),
    (warm, allowed, top_p, penalties, min_tokens),
    (warm, min_p, frequency_huge, logit_bias_1024),
    (warm, allowed_1024, logit_bias_1024, min_tokens_128, bad_words, penalties, top_k, top_p),
    (warm, min_p, top_k, small_top_p, penalties, logit_bias, min_tokens, bad_words),
]


def name_of(options: tuple[Option, ...]) -> str:
    return "+".join(option.__name__ for option in options)


def set_options(
    world: World, batch_idx: int, options: Iterable[Option], logits: torch.Tensor
) -> None:
    """Give one row of the batch its options; ``logits`` say which tokens are likely in it."""
    req = int(world.rows.idx_mapping[batch_idx])
    if req < 0:
        return
    row = {
        field.name: getattr(part, field.name)[req : req + 1]
        for part in (world.sampling, world.requests)
        for field in fields(part)
    }
    num_likely = min(10, world.vocab_size)
    likely = logits[batch_idx].float().topk(num_likely).indices.tolist()
    for option in options:
        option(SimpleNamespace(**row, likely=likely, vocab_size=world.vocab_size))


def set_all_options(world: World, options: Iterable[Option], logits: torch.Tensor) -> None:
    """Give every row the same options."""
    options = list(options)
    for batch_idx in range(world.num_reqs):
        set_options(world, batch_idx, options, logits)
