"""Compares the tokens of one form of the loop with stock vLLM's: how near is a difference?

The requests of a comparison carry no logprobs: those would take eager steps, not the recorded ones.
So a difference is looked at afterwards, in stock vLLM alone: the same batch once more, with the
scores of the two tokens in question, to which the noise of a seed is added for sampled requests.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fusedstep.bench.verify import NEAR_TIE, Item, compare
from fusedstep.ops.reference import gumbel_noise

Outputs = list[dict[str, Any]]  # as ``Engine.call("generate")`` gives them
Generate = Callable[[list[Any], list[dict[str, Any]]], Outputs]  # prompts, sampling parameters

# Stock's own token may be ours where its cut is as far away. Equal logits at the cut need no such
# allowance, as both sides call the same function; logits that were rounded otherwise do. A logit
# that moves by NEAR_TIE moves min-p's limit by that factor.
TOP_P_NUDGES = -0.005, 0.005
TOP_K_NUDGES = -2, -1, 1, 2
MIN_P_NUDGES = math.exp(-NEAR_TIE["bfloat16"]), math.exp(NEAR_TIE["bfloat16"])
# What a request asks for that is another thing once its first tokens are part of its prompt.
OF_OUTPUTS = {"frequency_penalty", "presence_penalty", "min_tokens"}
SAMPLED = {"temperature": 1.0, "top_p": 0.95}
# Whatever changes the recorded steps: greedy, seeds, each kind of truncation and adjustment.
PLAIN: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7},
)
CASES: tuple[dict[str, Any], ...] = (
    *PLAIN,
    SAMPLED,
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    {"temperature": 0.0, "logit_bias": {7: 4.0, 8: -4.0}},
    {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": [3, 5], "ignore_eos": False},
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1},
)


@dataclass(frozen=True)
class Batch:
    """Requests that are generated together, as token ids, all with seeds."""

    name: str
    prompts: list[dict[str, list[int]]]
    params: list[dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """A request whose tokens are not stock's from ``at`` on."""

    batch: str
    request: int
    verdict: str  # near-tie or DIFFERENT
    at: int | None
    stock_token: int | None
    fusedstep_token: int | None
    gap: float | None  # of stock's scores: its token's less ours, where they are known
    why: str


def make_batch(
    name: str,
    sampling: list[dict[str, Any]],
    prompt_lens: list[int],
    max_tokens: list[int],
    vocab_size: int,
) -> Batch:
    """One request per entry; its random prompt and its seed follow from ``name`` and its index."""
    rng = random.Random(name)
    prompts = [
        {"prompt_token_ids": [rng.randrange(vocab_size) for _ in range(n)]} for n in prompt_lens
    ]
    fixed = {"ignore_eos": True, "detokenize": False, "min_tokens": 0}
    params = [
        fixed | fields | {"max_tokens": n, "seed": 1000 + index}
        for index, (fields, n) in enumerate(zip(sampling, max_tokens, strict=True))
    ]
    return Batch(name, prompts, params)


def equality_batches(vocab_size: int, num_requests: int, max_tokens: int) -> list[Batch]:
    """Single requests, and batches in which rows end at different steps, of both variants."""
    n = num_requests
    lens = [3 + 11 * index % 37 for index in range(n)]
    ends = [max(max_tokens - 5 * index % max_tokens, 1) for index in range(n)]

    def cycle(cases: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
        return [cases[index % len(cases)] for index in range(n)]

    return [
        make_batch("one greedy", [{"temperature": 0.0}], [17], [max_tokens], vocab_size),
        make_batch("one sampled", [SAMPLED], [9], [max_tokens], vocab_size),
        make_batch("temperatures", cycle(PLAIN), lens, ends, vocab_size),
        make_batch("everything", cycle(CASES), lens, ends, vocab_size),
        make_batch("same length", cycle(CASES), lens, [max_tokens] * n, vocab_size),
    ]


def differences(
    batch: Batch, want: Outputs, have: Outputs, dtype: str, stock: Generate
) -> list[Difference]:
    """Differences of ``have`` from ``want``, stock's; in float32 nothing is a near-tie."""
    items = {
        request: item
        for request, (w, h) in enumerate(zip(want, have, strict=True))
        if (item := compare(w, h, 0, 0.0)).verdict != "identical"
    }
    if not items:
        return []
    if dtype == "float32":
        return [_difference(batch, request, items[request], None, "") for request in items]
    found = _scores(batch, want, items, stock)
    result = []
    for request, item in items.items():
        scores, why = found[request]
        if scores is None:
            result.append(_difference(batch, request, item, None, why))
            continue
        stock_side = dict(want[request]["completions"][0], logprobs={item.at: scores})
        judged = compare(
            want[request] | {"completions": [stock_side]}, have[request], 0, NEAR_TIE[dtype]
        )
        a, b = (scores[token][0] for token in (item.stock_token, item.fusedstep_token))
        result.append(_difference(batch, request, judged, a - b, ""))
    return _at_the_cut(batch, want, result, stock)


def _difference(batch: Batch, request: int, item: Item, gap: float | None, why: str) -> Difference:
    verdict = "near-tie" if item.verdict == "near-tie" else "DIFFERENT"
    tokens = item.stock_token, item.fusedstep_token
    return Difference(batch.name, request, verdict, item.at, *tokens, gap, why)


def _scores(
    batch: Batch, want: Outputs, items: dict[int, Item], stock: Generate
) -> dict[int, tuple[dict[Any, tuple[float, None]] | None, str]]:
    """Stock's scores of its token and of ours where they part, or None and why not."""
    params = [dict(p) for p in batch.params]
    for request, item in items.items():
        if item.stock_token is not None:
            params[request]["logprob_token_ids"] = [item.stock_token, item.fusedstep_token]
    again = stock(batch.prompts, params)
    found: dict[int, tuple[dict[Any, tuple[float, None]] | None, str]] = {}
    alone: dict[int, Item] = {}
    for request, item in items.items():
        if item.at is None or item.stock_token is None or item.fusedstep_token is None:
            found[request] = None, "another length or end"
            continue
        first = want[request]["completions"][0]["token_ids"][: item.at + 1]
        second = again[request]["completions"][0]
        if list(second["token_ids"][: item.at + 1]) != list(first):
            found[request] = None, "stock does not repeat itself"
            if not _depends_on_outputs(batch.params[request]):
                alone[request] = item
            continue
        found[request] = _with_noise(batch, request, item, second["logprobs"][item.at]), ""
    return found | (_scores_alone(batch, want, alone, stock) if alone else {})


def _depends_on_outputs(fields: dict[str, Any]) -> bool:
    return any(fields.get(name) for name in OF_OUTPUTS)


def _scores_alone(
    batch: Batch, want: Outputs, items: dict[int, Item], stock: Generate
) -> dict[int, tuple[dict[Any, tuple[float, None]] | None, str]]:
    """Stock's scores after the tokens that both gave, which are part of the prompt here."""
    prompts, params = [], []
    for request, item in items.items():
        tokens = want[request]["completions"][0]["token_ids"][: item.at]
        prompts.append({"prompt_token_ids": _prompt(batch, request) + list(tokens)})
        both = {"logprob_token_ids": [item.stock_token, item.fusedstep_token]}
        params.append(batch.params[request] | both | {"max_tokens": 1})
    outputs = stock(prompts, params)
    return {
        request: (_with_noise(batch, request, item, output["completions"][0]["logprobs"][0]), "")
        for (request, item), output in zip(items.items(), outputs, strict=True)
    }


def _with_noise(
    batch: Batch, request: int, item: Item, logprobs: dict[Any, tuple[float, Any]]
) -> dict[Any, tuple[float, None]]:
    """The scores by which a token is chosen: logprobs, of a sampled request with its noise."""
    tokens = [item.stock_token, item.fusedstep_token]
    scores = [logprobs[token][0] for token in tokens]
    if batch.params[request]["temperature"] > 0:
        assert item.at is not None
        position = len(_prompt(batch, request)) + item.at - 1
        noise = gumbel_noise(batch.params[request]["seed"], position, torch.tensor(tokens))
        scores = [a + b for a, b in zip(scores, noise.tolist(), strict=True)]
    return {token: (score, None) for token, score in zip(tokens, scores, strict=True)}


def _prompt(batch: Batch, request: int) -> list[int]:
    return batch.prompts[request]["prompt_token_ids"]


def _at_the_cut(
    batch: Batch, want: Outputs, found: list[Difference], stock: Generate
) -> list[Difference]:
    """Near-ties of the other kind: stock gives our token when its cut moves a little."""
    prompts, params, asked = [], [], []
    for index, difference in enumerate(found):
        fields = batch.params[difference.request]
        if difference.verdict != "DIFFERENT" or difference.gap is None:
            continue
        tokens = want[difference.request]["completions"][0]["token_ids"][: difference.at]
        prompt = _prompt(batch, difference.request) + list(tokens)
        for name, value in _nudged(fields):
            asked.append((index, f"{name} {value:g}"))
            prompts.append({"prompt_token_ids": prompt})
            params.append(fields | {name: value, "max_tokens": 1, "min_tokens": 0})
    if not asked:
        return found
    result = list(found)
    for (index, moved), output in zip(asked, stock(prompts, params), strict=True):
        ours = result[index].fusedstep_token
        if output["completions"][0]["token_ids"][0] == ours:
            why = f"stock gives it, too, with {moved}"
            result[index] = replace(result[index], verdict="near-tie", why=why)
    return result


def _nudged(fields: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The limits of a sampled request, each a little lower and higher."""
    if fields["temperature"] == 0:
        return
    if 0 < (top_p := fields.get("top_p", 1.0)) < 1:
        yield from (("top_p", min(top_p + nudge, 1.0)) for nudge in TOP_P_NUDGES)
    if (top_k := fields.get("top_k", 0)) > 0:
        yield from (("top_k", max(top_k + nudge, 1)) for nudge in TOP_K_NUDGES)
    if min_p := fields.get("min_p", 0.0):
        yield from (("min_p", min(min_p * factor, 1.0)) for factor in MIN_P_NUDGES)


def as_json(model: str, difference: Difference) -> dict[str, Any]:
    """For the report; JSON has no infinite gap (stock cut our token off)."""
    fields = {"model": model} | asdict(difference)
    if difference.gap is not None and not math.isfinite(difference.gap):
        fields |= {"gap": None, "why": "stock cut this token off"}
    return fields
