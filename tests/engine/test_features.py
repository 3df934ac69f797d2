"""Every feature of vLLM under fusedstep: the answers of stock vLLM, in windows or with a reason.

The model is tiny and random, but with a real tokenizer. Two processes, stock vLLM as it comes and
fusedstep, run one engine after the other, each with the options of a test (``conftest.py``).
"""

from __future__ import annotations

import json
import re
from typing import Any

import features_child
import pytest
import tiny_models
from engine_child import EngineChild
from features_child import OPTIONS, Ask

TWO_PLACES: dict[str, Any] = {
    "max_num_seqs": 2,
    "scheduling_policy": "priority",
    "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
}
PROMPTS = (
    "The capital of France is",
    "Once upon a time in a village",
    "def add(a, b):",
    "1, 2, 3, 1, 2, 3, 1, 2,",
    "A list of animals:",
)
LONG = {"max_tokens": 40, "ignore_eos": True}
PLAIN = [Ask(prompt, LONG, at=n) for n, prompt in enumerate(PROMPTS)]


def assert_windows(counts: dict[str, Any], *reasons: str) -> None:
    """Most steps were in windows; stock steps were prefills, or had these reasons."""
    assert counts["steps"] > 2 * counts["windows"] > 0, counts
    assert set(counts["stock_steps"]) == {"prefill", *reasons}, counts


def assert_stock(counts: dict[str, Any], reason: str) -> None:
    """No windows, for this reason."""
    assert counts["windows"] == 0, counts
    assert set(counts["stock_steps"]) == {reason}, counts


STRUCTURED: dict[str, Any] = {
    "json": {
        "json": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]{3,6}$"},
                "old": {"type": "boolean"},
            },
            "required": ["name", "old"],
            "additionalProperties": False,
        }
    },
    "regex": {"regex": r"\d{3}-[a-c]{5}"},
    "choice": {"choice": ["Rome is old", "Oslo is cold"]},
    "grammar": {"grammar": 'root ::= "yes " root | "no"'},
}


@pytest.mark.parametrize("kind", STRUCTURED)
def test_structured_output(compare: Any, kind: str) -> None:
    """The text obeys, and neither it nor its neighbours take a stock step for it."""
    special = {"max_tokens": 40, "structured_outputs": STRUCTURED[kind]}
    result = compare([*PLAIN[:2], Ask("An answer:", special, at=1)])
    text = result["answers"][2][0]["text"]
    if kind == "json":
        assert set(json.loads(text)) == {"name", "old"}
    elif kind == "regex":
        assert re.fullmatch(STRUCTURED[kind]["regex"], text)
    elif kind == "choice":
        assert text in STRUCTURED[kind]["choice"]
    else:
        assert re.fullmatch(r"(yes )*(no)?", text)
    assert_windows(result["counts"])


def test_tool_call(both: Any) -> None:
    """A named tool, as vLLM's API server asks for it: the tool in the prompt, its JSON schema as
    structured output. (Its parsers, which read the text, are not ours.)"""
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    messages = [{"role": "user", "content": "What is the weather in Rome?"}]
    fields = {"max_tokens": 60, "structured_outputs": {"json": parameters}}
    have, want = both(features_child.chat, {}, messages, tools, fields)
    assert have["text"] == want["text"]
    assert set(json.loads(have["text"])) == {"city", "days"}
    assert_windows(have["counts"])


@pytest.mark.parametrize("together", (False, True), ids=("one by one", "queued"))
def test_streamed_input(both: Any, together: bool) -> None:
    """A resumable request: pieces of input, each with its answer, beside a plain request."""
    pieces = [[5, 9, 200, 7], [77, 12, 40, 41, 42], list(range(300, 340))]
    have, want = both(features_child.stream, {}, pieces, 21, together)
    assert len(have["tokens"]) == 3 * 21
    assert have["tokens"] == want["tokens"]
    assert have["plain"] == want["plain"]
    assert_windows(have["counts"])


@pytest.mark.parametrize("together", (False, True), ids=("one by one", "queued"))
def test_streamed_input_that_gets_too_long(fused: EngineChild, tiny: str, together: bool) -> None:
    """The third piece would pass max_model_len: it and what comes after it end with "length"."""
    pieces = [list(range(n, n + 100)) for n in range(100, 600, 100)]
    have = fused.call(features_child.stream, tiny, OPTIONS, pieces, 21, together)
    want = fused.call(features_child.stream, tiny, OPTIONS, pieces[:2], 21, together)
    assert have["ended"] == ["length"] * 5 and want["ended"] == ["length"] * 2
    assert have["tokens"] == want["tokens"] and len(have["tokens"]) == 2 * 21
    assert have["plain"] == want["plain"]


@pytest.mark.parametrize("decode_steps", (1, "auto"))
@pytest.mark.parametrize("asynchronous", (True, False))
def test_an_id_that_is_used_again(
    fused: EngineChild, tiny: str, asynchronous: bool, decode_steps: object
) -> None:
    """Tokens in flight are the aborted request's, not those of the one that has its id now."""
    options = OPTIONS | {"async_scheduling": asynchronous}
    want = fused.call(features_child.ask, tiny, options, PLAIN)["answers"]
    have = fused.call(features_child.resubmit, tiny, options, decode_steps, list(PROMPTS))
    assert len(have) == len(want) and len(have[-1]) == 40
    for ours, one in zip(have, want, strict=True):
        assert len(ours) > 3 and ours == one[0]["token_ids"][: len(ours)]


def test_model_with_a_state_of_its_own(fused: EngineChild, tiny: str) -> None:
    """Its steps are vLLM's own. In windows, which do not know the state, all but the first token
    of each answer would be another model's."""

    def tokens(look_at_it: bool) -> tuple[list[list[int]], dict[str, Any]]:
        options = OPTIONS | {"seed": int(look_at_it)}  # an engine of its own
        args = tiny, options, PLAIN[:3], look_at_it
        result = fused.call(features_child.ask_with_own_state, *args)
        return [answer[0]["token_ids"] for answer in result["answers"]], result

    have, result = tokens(look_at_it=True)
    assert_stock(result["counts"], "model state ShiftState")
    assert result["scheduler"] == "model state ShiftState"
    wrong, result = tokens(look_at_it=False)
    assert_windows(result["counts"])
    assert [a[0] for a in wrong] == [a[0] for a in have]
    assert all(a[1:] != b[1:] for a, b in zip(wrong, have, strict=True))


def test_running_requests_lose_their_cache(compare: Any) -> None:
    """reset_prefix_cache(reset_running_requests=True) with windows in flight."""
    result = compare(PLAIN[:3], reset_at=4)
    assert_windows(result["counts"])


def test_beam_search(both: Any) -> None:
    """vLLM asks for one token per beam and step: nothing to put in a window."""
    have, want = both(features_child.beam_search, {}, PROMPTS[:2], 3, 8)
    for ours, theirs in zip(have["beams"], want["beams"], strict=True):
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        assert [s for _, s in ours] == pytest.approx([s for _, s in theirs], abs=1e-3)
    assert_stock(have["counts"], "prefill")


def test_paused_and_resumed_in_processes_of_its_own(
    stock: EngineChild, fused: EngineChild, tiny: str
) -> None:
    """AsyncLLM with two data-parallel engines, each with a worker under the mp executor.

    Every token is the one that a stock engine gives without pauses or company.
    """
    length = 150
    asks = [Ask(prompt, LONG | {"max_tokens": length}) for prompt in PROMPTS[:3]]
    want = stock.call(features_child.ask, tiny, OPTIONS, asks)["answers"]
    expected = [answer[0]["token_ids"] for answer in want]
    options = {"data_parallel_size": 2, "distributed_executor_backend": "mp"}
    have = fused.call(features_child.serve, tiny, OPTIONS | options, list(PROMPTS), length)
    for mode in ("keep", "wait", "abort"):
        seen = have[mode]
        assert seen["was_paused"] and not seen["is_paused"]
        assert seen["during"] == seen["still"], mode
        assert seen["during"][2] == 0, mode
        assert seen["tokens"][2] == expected[2], mode
        if mode == "abort":
            assert seen["reasons"] == ["abort", "abort", "length"]
            assert all(0 < n < length for n in seen["still"][:2])
            for tokens, full in zip(seen["tokens"][:2], expected, strict=False):
                assert tokens == full[: len(tokens)]
        else:
            assert seen["reasons"] == ["length"] * 3
            assert seen["tokens"] == expected, mode
            assert (seen["still"][:2] == [length, length]) == (mode == "wait"), seen["still"]
    assert have["ranks"] == expected * 2
    assert_windows(have["counts"])


@pytest.mark.parametrize("method", ("ngram", "draft_model"))
def test_speculative_decoding(
    stock: EngineChild, fused: EngineChild, tiny: str, method: str
) -> None:
    """The tokens of stock without speculation, in fewer steps. The draft model is the model itself;
    of two tokens to choose from, n-grams come again."""
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        config |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
        fields: dict[str, Any] = {"allowed_token_ids": [32, 33]}
    else:
        config |= {"model": tiny}
        fields = {}
    fields |= {"max_tokens": 24, "ignore_eos": True}
    sampled = fields | {"temperature": 0.8, "top_k": 1, "seed": 7}  # no greedy row, no chance
    prompts = PROMPTS[2:4]
    want = stock.call(features_child.ask, tiny, OPTIONS, [Ask(p, fields) for p in prompts])
    asks = [Ask(prompts[0], fields), Ask(prompts[1], sampled)]
    have = fused.call(features_child.ask, tiny, OPTIONS | {"speculative_config": config}, asks)
    tokens, expected = ([a[0]["token_ids"] for a in r["answers"]] for r in (have, want))
    assert tokens == expected
    assert_windows(have["counts"])
    assert have["counts"]["steps"] < 20, "no draft was accepted"


def test_priority(compare: Any) -> None:
    """Two places: who is admitted first is up to the priority, as in stock vLLM."""
    asks = [
        Ask(prompt, LONG | {"max_tokens": length}, priority=priority)
        for prompt, length, priority in zip(
            PROMPTS, (45, 60, 30, 20, 40), (3, 3, 2, 0, 1), strict=True
        )
    ]
    result = compare(asks, **TWO_PLACES)
    assert result["ended"] == result["stock"]["ended"] == [3, 4, 2, 0, 1]
    assert_windows(result["counts"])


def test_kv_events(compare: Any) -> None:
    """The same blocks are announced as stored; reserved and unused places are not."""
    result = compare(PLAIN, **TWO_PLACES)
    assert len(result["stored"]) >= len(PLAIN)
    assert_windows(result["counts"])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two LoRA adapters of random weights, as wide as the model."""
    return [
        tiny_models.make_adapter(n, tmp_path_factory.mktemp(f"lora-{n}") / f"adapter-{n}")
        for n in (1, 2)
    ]


@pytest.fixture
def mixed(adapters: list[str]) -> list[Ask]:
    """Requests with adapters and without, that come and go."""
    folders = [*adapters, None, *adapters]
    return [
        Ask(prompt, LONG | {"max_tokens": 30 + 5 * n}, at=3 * n, lora=folders[n])
        for n, prompt in enumerate([PROMPTS[0]] * 3 + list(PROMPTS[1:3]))
    ]


# One place more than there are adapters: vLLM's CPU kernels give a request without an adapter the
# one in the last place.
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}


def test_lora(compare: Any, mixed: list[Ask]) -> None:
    result = compare(mixed, **LORA)
    tokens = [answer[0]["token_ids"][:30] for answer in result["answers"]]
    assert tokens[0] != tokens[1] != tokens[2] != tokens[0]
    assert_windows(result["counts"])


def test_lora_adapters_take_turns(compare: Any, adapters: list[str]) -> None:
    """One place: the next adapter is loaded when no request has the one before any more."""
    asks = [Ask(p, LONG, at=n, lora=adapters[n % 2]) for n, p in enumerate(PROMPTS)]
    result = compare(asks, enable_lora=True, max_loras=1, max_cpu_loras=1, max_lora_rank=8)
    assert result["ended"] != sorted(result["ended"])
    assert_windows(result["counts"])


def test_a_window_without_its_adapters_shows(
    fused: EngineChild, stock: EngineChild, tiny: str, mixed: list[Ask]
) -> None:
    args = tiny, OPTIONS | LORA, mixed
    want = stock.call(features_child.ask, *args)
    have = fused.call(features_child.ask_without_adapters, *args)
    assert_windows(have["counts"])
    assert have["answers"] != want["answers"]


def test_custom_logits_processor(stock: EngineChild, fused: EngineChild, tiny: str) -> None:
    """vLLM's two runners have an interface each; fusedstep's is Model Runner V2's."""
    odd = LONG | {"extra_args": {"odd": True}}
    asks = [Ask(PROMPTS[0], LONG), Ask(PROMPTS[0], odd), Ask(PROMPTS[1], odd)]
    have, want = (
        child.call(
            features_child.ask,
            tiny,
            OPTIONS | {"logits_processors": [f"logits_processors:{name}"]},
            asks,
        )
        for child, name in ((fused, "OddV2"), (stock, "OddV1"))
    )
    tokens, expected = ([a[0]["token_ids"] for a in r["answers"]] for r in (have, want))
    assert tokens == expected
    assert all(token % 2 for answer in tokens[1:] for token in answer)
    assert any(token % 2 == 0 for token in tokens[0])
    assert_windows(have["counts"])


def test_pooling(both: Any) -> None:
    options = {"runner": "pooling", "convert": "embed"}
    have, want = both(features_child.embed, options, list(PROMPTS))
    for ours, theirs in zip(have["vectors"], want["vectors"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert len({tuple(vector) for vector in have["vectors"]}) == len(PROMPTS)
    assert_stock(have["counts"], "pooling model")


def test_sleep_mode_is_refused_as_stock_refuses_it(both: Any) -> None:
    have, want = both(features_child.refusal, {"enable_sleep_mode": True})
    assert have == want != ""
