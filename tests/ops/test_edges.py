"""Rows at the edges: flat, infinite, NaN, unaligned, padded, with huge penalties."""

from __future__ import annotations

import pytest
import torch
from ops.options import (
    COMBINATIONS,
    OPTIONS,
    Option,
    allowed,
    allowed_1024,
    bad_words,
    cold,
    greedy,
    hot,
    min_p,
    min_tokens,
    min_tokens_128,
    name_of,
    neutral,
    set_all_options,
    set_options,
    small_top_p,
    tiny_top_p,
    top_k,
    top_k_1,
    top_k_most,
    top_p,
    warm,
)
from ops.world import (
    DTYPES,
    POISON,
    PROMPT_LEN,
    Implementation,
    build_world,
    compare,
    random_logits,
    run,
    strided,
)

ONLY_SCALE = (greedy, neutral, cold, hot, warm, top_k, top_k_1, top_k_most)


@pytest.mark.parametrize("fill", [0.0, -3e4])
def test_flat_rows(implementation: Implementation, fill: float) -> None:
    """All logits are equal: the options' own order and the noise decide."""
    n = len(COMBINATIONS)
    logits = torch.full((n, 100), fill)
    world = build_world(100, n)
    for batch_idx, options in enumerate(COMBINATIONS):
        set_options(world, batch_idx, options, logits)
    compare(world, logits, implementation)


def test_rows_of_minus_infinity(implementation: Implementation) -> None:
    """Where nothing is left to choose from, the token is 0."""
    n = len(OPTIONS)
    logits = torch.full((n, 100), -torch.inf)
    world = build_world(100, n)
    for batch_idx, option in enumerate(OPTIONS):
        set_options(world, batch_idx, [option], logits)
    assert compare(world, logits, implementation) == [0] * n


def test_rows_of_infinity(implementation: Implementation) -> None:
    """The first of the largest, wherever no softmax is asked of them."""
    logits = torch.full((len(ONLY_SCALE), 100), torch.inf)
    logits[:, :5] = 1.0
    world = build_world(100, len(ONLY_SCALE))
    for batch_idx, option in enumerate(ONLY_SCALE):
        set_options(world, batch_idx, [option], logits)
    assert compare(world, logits, implementation) == [5] * len(ONLY_SCALE)


def test_rows_with_one_finite_logit(implementation: Implementation) -> None:
    may_forbid = (allowed, allowed_1024, bad_words, min_tokens, min_tokens_128)
    options = [option for option in OPTIONS if option not in may_forbid]
    logits = torch.full((len(options), 1000), -torch.inf)
    logits[:, 700] = -5.0
    world = build_world(1000, len(options))
    for batch_idx, option in enumerate(options):
        set_options(world, batch_idx, [option], logits)
    assert compare(world, logits, implementation) == [700] * len(options)


@pytest.mark.parametrize("options", [*COMBINATIONS[-12:], (neutral,), (greedy,)], ids=name_of)
def test_rows_mostly_of_minus_infinity(
    implementation: Implementation, options: tuple[Option, ...]
) -> None:
    """As after a grammar's mask: a few tokens are left, fewer than top-k or the options ask for."""
    logits = random_logits(2, 1000, seed=5)
    kept = torch.zeros(2, 1000, dtype=torch.bool)
    kept[0, [3, 998, 999]] = True
    kept[1, ::100] = True
    logits = logits.masked_fill(~kept, -torch.inf).bfloat16()
    world = build_world(1000, 2)
    set_all_options(world, options, logits)
    compare(world, logits, implementation)


def test_positive_and_negative_zero_are_equal(implementation: Implementation) -> None:
    """In the argmax, at the limit of top-k, and in the order of top-p."""
    logits = torch.full((64, 63), -1.0)
    logits[:, 10:40:2], logits[:, 11:40:2] = -0.0, 0.0
    world = build_world(63, 64)
    rows = [(greedy,), (neutral,), (top_k_1,), (top_p,), (tiny_top_p,), (hot, small_top_p)]
    for batch_idx in range(64):
        set_options(world, batch_idx, rows[batch_idx % len(rows)], logits)
    tokens = compare(world, logits, implementation)
    assert tokens[0] == 10 and len(set(tokens[2::6])) > 1 and set(tokens[4::6]) == {39}


def test_nan_logits_give_some_token(implementation: Implementation) -> None:
    n = len(OPTIONS)
    logits = torch.full((n, 1000), torch.nan)
    logits[: n // 2, ::2] = 1.0
    world = build_world(1000, n)
    for batch_idx, option in enumerate(OPTIONS):
        set_options(world, batch_idx, [option], torch.zeros_like(logits))
    out = run(
        world,
        implementation.step_class,
        logits,
        needs=world.needs(logprobs=True),
        device=implementation.device,
    )
    assert all(0 <= token < 1000 for token in out.rows.sampled[:n].tolist())
    assert out.rows.num_active.item() == n


def test_infinity_with_truncation_gives_some_token(implementation: Implementation) -> None:
    """The softmax of +inf is NaN: nothing is defined, but nothing may be read outside."""
    options = [(top_p,), (small_top_p,), (min_p,), (warm, top_k, top_p)]
    logits = torch.full((len(options), 100), torch.inf)
    world = build_world(100, len(options))
    for batch_idx, row in enumerate(options):
        set_options(world, batch_idx, row, logits)
    out = run(world, implementation.step_class, logits, device=implementation.device)
    assert all(0 <= token < 100 for token in out.rows.sampled[: len(options)].tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("extra", "offset"), [(0, 0), (3, 0), (0, 1), (3, 1), (64, 5)], ids=str)
def test_unaligned_rows(
    implementation: Implementation, extra: int, offset: int, dtype: torch.dtype
) -> None:
    """Odd strides and offsets, +inf between the rows and behind the last."""
    rows = [(greedy,), (neutral,), (warm, top_k, top_p), (greedy,)]
    logits = strided(random_logits(4, 1001).to(dtype), 1001 + extra, offset)
    world = build_world(1001, 4)
    for batch_idx, options in enumerate(rows):
        set_options(world, batch_idx, options, logits)
    compare(world, logits, implementation, needs=world.needs(logprobs=True))


def test_transposed_batch_of_one_logit(implementation: Implementation) -> None:
    """A vocabulary of one token has no stride to check."""
    logits = random_logits(5, 7)[:, 3:4]
    assert compare(build_world(1, 5), logits, implementation) == [0] * 5


def test_inactive_rows_are_left_alone(implementation: Implementation) -> None:
    """No steps, stopped, padding: nothing is sampled, no state of the request moves."""
    logits = random_logits(6, 63).half()
    world = build_world(63, 6, padding=(3, 5))
    world.rows.steps_allowed[1] = 0
    world.requests.stopped[world.rows.idx_mapping[2]] = True
    tokens = compare(world, logits, implementation, needs=world.needs(logprobs=True))
    assert [token == POISON for token in tokens] == [False, True, True, True, False, True]


def test_only_padding(implementation: Implementation) -> None:
    world = build_world(63, 3, padding=(0, 1, 2))
    assert compare(world, random_logits(3, 63), implementation) == [POISON] * 3


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("sign", [-1, 1])
def test_huge_penalties(implementation: Implementation, sign: int, scale: float) -> None:
    """Repetition 1e6 and 1e-6, frequency and presence +-1e4, at every sign of the logits."""
    values = [(1e6, 0.0), (1e-6, 0.0), (1.0, 1e4), (1.0, -1e4), (1e6, -1e4), (1e-6, 1e4)]
    n = 2 * len(values)
    logits = random_logits(n, 63, scale=scale)
    world = build_world(63, n)
    for batch_idx in range(n):
        req = world.rows.idx_mapping[batch_idx]
        repetition, additive = values[batch_idx // 2]
        world.sampling.repetition_penalty[req] = repetition
        world.sampling.frequency_penalty[req] = additive * sign
        world.sampling.presence_penalty[req] = -additive * sign / 3
        world.sampling.temperature[req] = batch_idx % 2
    compare(world, logits, implementation)


def test_bad_words(implementation: Implementation) -> None:
    """A word forbids its last token if the tokens before that one end the output."""
    length, vocab_size = PROMPT_LEN + 6, 63
    tokens = list(range(20, 20 + length))
    matches: dict[tuple[int, ...], bool] = {
        (): True,
        tuple(tokens[-1:]): True,
        tuple(tokens[-2:]): True,
        tuple(tokens[-6:]): True,  # all of the output
        tuple(tokens[-7:]): False,  # and the prompt's last token
        (7,): False,
        (7, tokens[-1]): False,
        (tokens[-2], 7): False,
        (tokens[-3], 7, tokens[-1]): False,
        tuple(tokens[-3:-1]): False,
        tuple(tokens[-1:] * 60): False,
    }
    n = len(matches)
    logits = random_logits(n, vocab_size)
    world = build_world(vocab_size, n)
    requests, sampling = world.requests, world.sampling
    requests.total_len.fill_(length)
    requests.num_computed_tokens.fill_(length - 1)
    requests.all_token_ids[:, :length] = torch.tensor(tokens).int()
    set_all_options(world, [greedy], logits)
    for req, prefix, row in zip(world.rows.idx_mapping, matches, logits, strict=False):
        word = torch.tensor([*prefix, row.argmax()]).int()
        sampling.num_bad_words[req] = 2  # the first one matches never
        sampling.bad_word_offsets[req, :3] = torch.tensor([0, 2, 2 + len(word)]).int()
        sampling.bad_word_token_ids[req, 2 : 2 + len(word)] = word
    ranked = logits.argsort(descending=True)
    expected = [row[1 if match else 0] for row, match in zip(ranked, matches.values(), strict=True)]
    assert compare(world, logits, implementation) == expected


def test_last_entries_of_full_lists(implementation: Implementation) -> None:
    """1024 allowed tokens, 1024 biases, 128 stop tokens: the last one counts like the first."""
    vocab_size, best, row = 2500, 2400, torch.arange(1024)
    logits = random_logits(3, vocab_size)
    logits[:, best] = 50.0
    world = build_world(vocab_size, 3)
    set_all_options(world, [greedy], logits)
    sampling = world.sampling
    first, second, third = world.rows.idx_mapping[:3].tolist()
    sampling.num_allowed_token_ids[first] = 1024
    sampling.allowed_token_ids[first] = row.int()
    sampling.allowed_token_ids[first, 1023] = best
    sampling.num_logit_bias[second] = 1024
    sampling.logit_bias_token_ids[second] = row.int() + 7
    sampling.logit_bias[second, 1023] = 70.0
    sampling.num_min_stop_token_ids[third] = 128
    sampling.min_stop_token_ids[third] = row[:128].int()
    sampling.min_stop_token_ids[third, 127] = best
    sampling.min_lens[third] = 90
    tokens = compare(world, logits, implementation)
    assert tokens[:2] == [best, 1030] and tokens[2] != best
