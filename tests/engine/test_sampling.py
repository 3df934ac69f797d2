"""What our kernels do not do for a request is done inside the window, by vLLM's own functions.

All modes and kinds of logprobs, thinking budgets, custom logits processors: tokens and logprobs are
those of stock Model Runner V2. A tiny random model, float32.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import features_child
import pytest
import tiny_models
from engine_child import EngineChild
from features_child import Ask, FeatureChild

OPTIONS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 8,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 24,
    "max_logprobs": -1,
}
MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")
DRAWN = {"temperature": 0.8, "top_p": 0.9, "top_k": 50}
STOPS = {"stop_token_ids": list(range(0, tiny_models.VOCAB_SIZE, 30))}  # after some 30 tokens
THINKS, ENDS = 7, (8, 9)  # token ids that begin and end a thought


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def fused() -> Iterator[EngineChild]:
    child = FeatureChild("on")
    yield child
    child.close()


def asks(*fields: dict[str, Any], prompt: tuple[int, ...] = ()) -> list[Ask]:
    """Requests that come one after the other and end one after the other."""
    rng = random.Random(0)
    made = []
    for number, own in enumerate(fields):
        words = [rng.randint(tiny_models.FIRST_WORD, tiny_models.LAST_WORD) for _ in range(12)]
        given = {"max_tokens": 20 + 3 * number, "ignore_eos": True, "seed": number} | own
        made.append(Ask({"prompt_token_ids": [*words, *prompt]}, given, at=2 * number))
    return made


LOGPROBS = asks(
    {"logprobs": 0},
    DRAWN | {"logprobs": 5},
    DRAWN,
    {"logprob_token_ids": [5, 1000, 17]},
    DRAWN | {"logprobs": 2, "repetition_penalty": 1.3, "logit_bias": {40: 3.0}},
    {"logprobs": -1, "min_p": 0.05, "temperature": 1.0},
    DRAWN | {"allowed_token_ids": list(range(300, 340)), "logprobs": 60},
)
BUDGETS = asks(
    {"thinking_token_budget": 6},
    {"thinking_token_budget": 0} | DRAWN,
    {},
    {"thinking_token_budget": 11, "min_tokens": 4, "bad_words": ["w8 w9"]},
    DRAWN | {"logprobs": 0},
    prompt=(THINKS,),
)
ODD = asks({"extra_args": {"odd": True}}, {}, DRAWN | {"extra_args": {"odd": True}, "logprobs": 0})


def assert_equal(have: Any, want: Any, number: int) -> None:
    assert len(have) == len(want) == 1
    ours, theirs = have[0], want[0]
    assert ours["token_ids"] == theirs["token_ids"], number
    assert bool(ours["logprobs"]) == bool(theirs["logprobs"]), number
    for a, b in zip(ours["logprobs"] or (), theirs["logprobs"] or (), strict=True):
        assert len(a) == len(b), number
        a, b = possible(a), possible(b)
        assert a.keys() == b.keys(), number
        for token, (value, rank) in b.items():
            assert a[token][1] == rank, number
            assert math.isclose(a[token][0], value, abs_tol=2e-5), number


def possible(step: dict[int, tuple[float, int]]) -> dict[int, tuple[float, int]]:
    """Without the tokens at -inf: they are equal, and any of them may fill the top n."""
    return {token: entry for token, entry in step.items() if entry[0] > -math.inf}


@pytest.fixture
def compare(oracle: EngineChild, fused: EngineChild, llama: str) -> Any:
    def compare(requests: list[Ask], **options: Any) -> Any:
        args = llama, OPTIONS | options, requests
        want = oracle.call(features_child.ask, *args)
        have = fused.call(features_child.ask, *args)
        for number, answers in enumerate(zip(have["answers"], want["answers"], strict=True)):
            assert_equal(*answers, number)
        assert have["counts"]["windows"] > 2
        assert have["counts"]["steps"] > 2 * have["counts"]["windows"]
        assert set(have["counts"]["stock_steps"]) == {"prefill"}
        return [answer[0] for answer in have["answers"]]

    return compare


@pytest.mark.parametrize("mode", MODES)
def test_logprobs(compare: Any, mode: str) -> None:
    answers = compare(LOGPROBS, logprobs_mode=mode)
    # All have stopped before the host knows: the next window has no rows.
    compare(
        asks(*[DRAWN | {"logprobs": n, "max_tokens": 90} | STOPS for n in (0, 3)]),
        logprobs_mode=mode,
    )
    steps = [answer["logprobs"] for answer in answers]
    assert steps[2] is None
    assert set(steps[3][9]) >= {5, 1000, 17}  # and the sampled token
    assert len(steps[5][9]) == tiny_models.VOCAB_SIZE
    assert (len(possible(steps[6][9])) <= 41) == mode.startswith("processed")


def test_thinking_ends_with_its_budget(compare: Any, fused: EngineChild, llama: str) -> None:
    options = {"reasoning_config": {"reasoning_start_str": "w7", "reasoning_end_str": "w8 w9"}}
    answers = compare(BUDGETS, **options)
    assert tuple(answers[0]["token_ids"][6:8]) == ENDS
    assert tuple(answers[1]["token_ids"][:2]) == ENDS
    assert tuple(answers[3]["token_ids"][11:13]) == ENDS  # although it is a bad word
    plain = fused.call(features_child.ask_without_processing, llama, OPTIONS | options, BUDGETS)
    assert tuple(plain["answers"][0][0]["token_ids"][6:8]) != ENDS  # windows alone do not do it


def test_a_custom_logits_processor_is_called_in_every_step(
    compare: Any, fused: EngineChild, llama: str
) -> None:
    options = {"logits_processors": ["logits_processors:OddV2"]}
    answers = compare(ODD, **options)
    assert all(token % 2 for n in (0, 2) for token in answers[n]["token_ids"])
    assert any(token % 2 == 0 for token in answers[1]["token_ids"])
    plain = fused.call(features_child.ask_without_processing, llama, OPTIONS | options, ODD)
    assert any(token % 2 == 0 for token in plain["answers"][0][0]["token_ids"])
