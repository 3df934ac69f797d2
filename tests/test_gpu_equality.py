"""``bench.gpu_equality``: which differences are near-ties, and the requests that are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_engine import VOCAB, output

from fusedstep.bench.gpu_check import equality as gpu_equality
from fusedstep.ops.reference import gumbel_noise


def batch(**params: Any) -> gpu_equality.Batch:
    made = gpu_equality.make_batch("test", [params], [3], [4], VOCAB)
    return replace(made, prompts=[{"prompt_token_ids": [1, 2, 3]}])


def judged(
    asked: gpu_equality.Batch, want: list[int], have: list[int], *answers: list[dict[str, Any]]
) -> list[gpu_equality.Difference]:
    """Differences in bfloat16, with stock's further outputs in the order of the questions."""
    left: Iterator[list[dict[str, Any]]] = iter(answers)
    found = gpu_equality.differences(
        asked, [output(want)], [output(have)], "bfloat16", lambda prompts, params: next(left)
    )
    assert next(left, None) is None
    return found


def logprobs(at: int, **scores: float) -> list[dict[int, tuple[float, int]]]:
    step = {int(token[1:]): (score, 1) for token, score in scores.items()}
    return [{}] * at + [step]


@pytest.mark.parametrize(("ours", "verdict"), [(-1.1, "near-tie"), (-1.5, "DIFFERENT")])
def test_a_greedy_difference_is_judged_by_stock(ours: float, verdict: str) -> None:
    again = [output([5, 6, 7, 8], logprobs(2, t7=-1.0, t9=ours))]
    (found,) = judged(batch(temperature=0.0), [5, 6, 7, 8], [5, 6, 9, 1], again)
    assert (found.verdict, found.at) == (verdict, 2)
    assert (found.stock_token, found.fusedstep_token) == (7, 9)
    assert found.gap == pytest.approx(-1.0 - ours)


def test_a_sampled_difference_is_judged_with_the_noise() -> None:
    """At position 4: three prompt tokens and two of the output came before."""
    noise = gumbel_noise(1000, 4, torch.tensor([7, 9])).tolist()
    again = [output([5, 6, 7, 8], logprobs(2, t7=-noise[0], t9=0.1 - noise[1]))]
    (found,) = judged(batch(temperature=0.7), [5, 6, 7, 8], [5, 6, 9, 1], again)
    assert found.verdict == "near-tie" and found.gap == pytest.approx(-0.1, abs=1e-5)


LIMITS = [({"top_p": 0.95}, 2), ({"top_k": 20}, 4), ({"min_p": 0.05}, 2)]


@pytest.mark.parametrize(("limit", "nudges"), LIMITS, ids=str)
@pytest.mark.parametrize(("last", "verdict"), [(9, "near-tie"), (7, "DIFFERENT")])
def test_a_token_at_the_cut(last: int, verdict: str, limit: dict[str, Any], nudges: int) -> None:
    again = [output([5, 6, 7, 8], logprobs(2, t7=-1.0, t9=float("-inf")))]
    nudged = [output([7])] * (nudges - 1) + [output([last])]
    asked = batch(temperature=1.0, **limit)
    (found,) = judged(asked, [5, 6, 7, 8], [5, 6, 9, 1], again, nudged)
    assert found.verdict == verdict
    assert gpu_equality.as_json("m", found)["gap"] is None


@pytest.mark.parametrize(("ours", "verdict"), [(-1.1, "near-tie"), (-1.5, "DIFFERENT")])
def test_where_stock_does_not_repeat_itself(ours: float, verdict: str) -> None:
    """It is asked for the next token alone, after those that both gave."""
    questions: list[Any] = []

    def stock(prompts: list[Any], params: list[dict[str, Any]]) -> list[dict[str, Any]]:
        questions.append((prompts[0]["prompt_token_ids"], params[0]["max_tokens"]))
        if len(questions) == 1:
            return [output([5, 1, 7, 8], logprobs(2, t7=0.0, t9=0.0))]
        return [output([7], logprobs(0, t7=-1.0, t9=ours))]

    (found,) = gpu_equality.differences(
        batch(temperature=0.0), [output([5, 6, 7, 8])], [output([5, 6, 9, 1])], "bfloat16", stock
    )
    assert questions == [([1, 2, 3], 4), ([1, 2, 3, 5, 6], 1)]
    assert (found.verdict, found.gap) == (verdict, pytest.approx(-1.0 - ours))


@pytest.mark.parametrize(
    ("fields", "have", "again", "why"),
    [
        ({}, [5, 6], [5, 6, 7, 8], "another length or end"),
        # Its output would be part of the prompt, which has no such penalty.
        ({"presence_penalty": 0.5}, [5, 6, 9, 1], [5, 1, 7, 8], "stock does not repeat itself"),
    ],
)
def test_differences_that_cannot_be_judged(
    fields: dict[str, Any], have: list[int], again: list[int], why: str
) -> None:
    answer = [output(again, logprobs(2, t7=0.0, t9=0.0))]
    (found,) = judged(batch(temperature=0.0, **fields), [5, 6, 7, 8], have, answer)
    assert (found.verdict, found.gap, found.why) == ("DIFFERENT", None, why)


def test_equal_outputs_ask_nothing() -> None:
    assert judged(batch(temperature=0.0), [5, 6], [5, 6]) == []


def test_requests_are_the_same_in_every_process() -> None:
    for ours, theirs in zip(*(gpu_equality.equality_batches(VOCAB, 13, 24),) * 2, strict=True):
        assert ours == theirs
    *_, everything, same_length = gpu_equality.equality_batches(VOCAB, 13, 24)
    assert {"seed", "max_tokens"} <= set.intersection(*map(set, everything.params))
    assert not any("logprobs" in params for params in everything.params)
    assert len({params["max_tokens"] for params in everything.params}) > 5
    assert {params["max_tokens"] for params in same_length.params} == {24}
