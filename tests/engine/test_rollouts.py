"""What RL frameworks do with an engine: rollouts, new weights in flight, groups, sleep."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import rollout_child
import torch
from engine_child import EngineChild
from features_child import CONFIG, OPTIONS

from fusedstep.bench.rollout_result import Run, compare

PROMPTS = ["The capital of France is", "Once upon a time in a village", "def add(a, b):"]
PLAN: dict[str, Any] = {
    "num_prompts": 3,
    "samples": 4,
    "input_len": 8,
    "output_len": 100,
    "lengths": "ragged",
    "repeats": 2,
}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> str:
    """The model after training: other weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG)).save_pretrained(folder)
    shutil.copy(Path(tiny, "tokenizer.json"), folder)
    return str(folder)


def as_stock_updates(
    stock: EngineChild, tiny: str, have: dict[str, Any], folders: list[str], late: int = 0
) -> dict[str, Any]:
    """Stock's answers where its weights change when they did in ``have``, the first time ``late``
    tokens later; its requests come as far apart as they did there."""
    first, second = (given["0"] for given in have["given"])
    given = [have["given"][0][str(n)] for n in range(3)]
    lags = tuple(max(given) - tokens for tokens in given)  # the first prompt may not be the first
    updates = [(first + late, folders[0]), (second, folders[1])]
    answers: dict[str, Any] = stock.call(
        rollout_child.update, tiny, OPTIONS, PROMPTS, updates, lags
    )
    return answers


@pytest.mark.parametrize("asynchronous", (True, False))
def test_new_weights_between_windows(
    stock: EngineChild, fused: EngineChild, tiny: str, other: str, asynchronous: bool
) -> None:
    """A window is of one policy. The control: one token of the old weights more shows."""
    options = OPTIONS | {"async_scheduling": asynchronous}
    folders = [other, tiny]
    updates = [(20, other), (80, tiny)]
    have = fused.call(rollout_child.update, tiny, options, PROMPTS, updates)
    want = as_stock_updates(stock, tiny, have, folders)
    assert have["given"] == want["given"]
    assert have["tokens"] == want["tokens"]
    assert have["counts"]["steps"] > 2 * have["counts"]["windows"] > 0
    late = as_stock_updates(stock, tiny, have, folders, late=1)
    assert all(a != b for a, b in zip(late["tokens"], want["tokens"], strict=True))


@pytest.fixture(scope="module")
def served(fused: EngineChild, tiny: str, other: str) -> dict[str, Any]:
    result: dict[str, Any] = fused.call(rollout_child.serve, tiny, OPTIONS, PROMPTS, other)
    assert result["counts"]["steps"] > 2 * result["counts"]["windows"] > 0
    return result


@pytest.fixture(scope="module")
def expected(stock: EngineChild, tiny: str) -> list[list[int]]:
    """Stock's answers without anything that happens in between."""
    tokens: list[list[int]] = stock.call(rollout_child.update, tiny, OPTIONS, PROMPTS, [])["tokens"]
    return tokens


def test_new_weights_while_a_window_runs(
    stock: EngineChild, served: dict[str, Any], tiny: str, other: str
) -> None:
    """Engine and worker are processes of their own: the window in flight ends first."""
    have = served["update"]
    assert max(have["given"][1].values()) < rollout_child.LENGTH  # they still ran
    want = as_stock_updates(stock, tiny, have, [other, tiny])
    assert have["given"] == want["given"]
    assert have["tokens"] == want["tokens"]


def test_prefix_cache_is_reset_while_requests_run(
    served: dict[str, Any], expected: list[list[int]]
) -> None:
    assert served["reset"]["was_reset"] == [False, True]
    assert served["reset"]["tokens"] == expected


def test_sleep_that_keeps_requests(served: dict[str, Any], expected: list[list[int]]) -> None:
    """On a CPU vLLM frees no memory and says so; the engine is paused all the same."""
    seen = served["sleep"]
    assert seen["asleep"] == [True, False]
    assert seen["seen"] == seen["still"] and max(seen["still"]) < rollout_child.LENGTH
    assert seen["tokens"] == expected


def test_a_group_is_aborted(served: dict[str, Any], expected: list[list[int]]) -> None:
    """Its samples end, a request beside it goes on, and no KV-cache block is left behind."""
    seen = served["abort"]
    assert seen["reasons"] == ["abort"] * 3
    assert len({tuple(sample) for sample in seen["whole"]}) == 3
    for part, whole in zip(seen["part"], seen["whole"], strict=True):
        assert 5 <= len(part) < len(whole) and part == whole[: len(part)]
    assert seen["beside"] == expected[0]
    assert seen["all_free"]


@pytest.mark.parametrize(("temperature", "logprobs"), ((0.0, None), (1.0, 0), (1.0, 1)))
def test_rollouts_of_the_bench(
    stock: EngineChild,
    oracle: EngineChild,
    fused: EngineChild,
    tiny: str,
    temperature: float,
    logprobs: int | None,
) -> None:
    """More samples than rows, ragged ends, a seed each: tokens and logprobs are stock's."""

    def run(child: EngineChild, repeat: int = 1) -> Run:
        plan = PLAN | {"temperature": temperature, "logprobs": logprobs}
        return Run.of(*child.call(rollout_child.roll_out, tiny, OPTIONS, repeat, **plan))

    have, want = run(fused), run(oracle if temperature else stock)
    found = compare(want, have, "stock", "float32")
    assert found.agrees and found.same == found.samples == 12 and found.tokens > 200
    assert (found.logprob_gap is None) == (logprobs is None)
    assert have.rows == 4 and list(map(len, have.tokens)) == list(map(len, want.tokens))
    assert want.counts is None and have.counts is not None
    assert have.counts.tokens == have.num_tokens == found.tokens
    assert have.counts.steps > 2 * have.counts.windows > 0
    assert have.seconds == pytest.approx(max(have.ended), rel=0.5)
    assert not compare(want, run(fused, repeat=2), "stock", "float32").agrees
