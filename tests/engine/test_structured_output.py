"""Structured output in windows: stock vLLM's tokens, whatever the grammar and whoever else runs.

Stock is vLLM's own Model Runner V2, which promises a seed's tokens. The model is tiny and random,
but with a real tokenizer (``conftest.py``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structured_child
from engine_child import EngineChild
from features_child import OPTIONS
from jsonschema import validate
from standin_child import StandInChild

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "def"]}, "maxItems": 3},
        "at": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {"n": {"type": "object", "properties": {"k": {"$ref": "#/$defs/n"}}}},
    "$ref": "#/$defs/n",
}
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<f"],
        "tags": [
            {
                "begin": "<f=a>",
                "content": {"type": "json_schema", "json_schema": PERSON},
                "end": "</f>",
            }
        ],
    },
}


def asked(prompt: str, *, at: int = 0, **fields: Any) -> tuple[str, dict[str, Any], int]:
    structured = {
        name: fields.pop(name)
        for name in ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        if name in fields
    }
    if structured:
        fields["structured_outputs"] = structured
    return prompt, {"max_tokens": 40, "temperature": 0.0} | fields, at


# More than there are rows, with free text between them; some come in others' windows.
REQUESTS = [
    asked("A person:", json=PERSON),
    asked("Once upon a time", temperature=1.0, seed=1, ignore_eos=True),
    asked("A person:", json=PERSON, temperature=1.0, seed=2),
    asked("A number:", regex=r"\d{3}-[a-c]{5}( [x-z]+)?", temperature=0.8, seed=3, top_k=40),
    asked("Choose:", choice=["Rome is old", "Oslo is cold", "Rome"], temperature=1.2, seed=4, at=2),
    asked("Say:", grammar='root ::= "yes " root | "no"', temperature=1.5, seed=5, at=3),
    asked("def add(a, b):", ignore_eos=True, at=4),
    asked("An object:", json_object=True, temperature=1.0, seed=6, at=5),
    asked("A person:", json=PERSON, temperature=1.0, seed=7, top_p=0.9, repetition_penalty=1.2),
    asked("A person:", json=PERSON, temperature=0.9, seed=8, n=2, presence_penalty=0.4, at=6),
    asked("A tree:", json=TREE, temperature=1.0, seed=9, at=7),
    asked("Letters:", regex="[a-z]{1,30}", temperature=1.0, seed=10, min_tokens=6, at=8),
    asked("Letters:", regex="[a-z ]{3,40}", temperature=1.0, seed=11, stop=["q", "zz"], at=8),
    asked("Letters:", regex="[a-z ]{3,9}", temperature=1.0, seed=12, ignore_eos=True, at=9),
    asked("Digits:", regex="[0-9 ]{3,40}", logit_bias={33: 8.0}, temperature=1.0, seed=13, at=9),
    asked("Words:", regex="[a-z ]{3,60}", stop_token_ids=[30, 65], temperature=1.0, seed=14),
    asked("A person:", json=PERSON, temperature=1.0, seed=15, logprobs=2, at=10),
    asked("A person:", json=PERSON, temperature=1.0, seed=16, min_p=0.02, logprobs=0, at=10),
    asked("A call:", structural_tag=json.dumps(TAG), temperature=1.0, seed=17, at=11),
    asked("A person:", json=PERSON, temperature=0.7, seed=18, bad_words=["the"], at=11),
]
OUTSIDE = "structured output beyond its automaton"
WHOLE = [0, 2, 8, 16, 17, 19]  # those that are about a person


@pytest.fixture(scope="module")
def expected(oracle: EngineChild, tiny: str) -> dict[str, Any]:
    result: dict[str, Any] = oracle.call(structured_child.run, tiny, OPTIONS, REQUESTS)
    return result


def assert_same(have: dict[str, Any], want: dict[str, Any], requests: list[Any] = REQUESTS) -> None:
    for one, ours, theirs in zip(requests, have["completions"], want["completions"], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            for name in ("token_ids", "text", "finish_reason", "stop_reason"):
                assert a[name] == b[name], one
            for step, other in zip(a["logprobs"] or (), b["logprobs"] or (), strict=True):
                assert step.keys() == other.keys(), one
                for token, (logprob, rank) in step.items():
                    assert (pytest.approx(logprob, abs=1e-4), rank) == other[token], one


@pytest.mark.parametrize("decode_steps", (2, 7, 64, "auto"))
def test_equal_to_stock(
    fused: EngineChild, tiny: str, expected: dict[str, Any], decode_steps: object
) -> None:
    have = fused.call(structured_child.run, tiny, OPTIONS, REQUESTS, decode_steps)
    assert_same(have, expected)
    counts = have["counts"]
    assert counts["steps"] > 1.5 * counts["windows"] > 0, counts
    assert set(counts["stock_steps"]) == {"prefill"}, have["turns"]


# What vLLM takes beside drafts, and grammars whose words come again, so that drafts hold.
DRAFTED = [
    *(one for one in REQUESTS if not {"min_p", "logit_bias"} & one[1].keys()),
    asked("Again:", regex="(ab, cd; )+", at=12),
    asked("Again:", regex="(x[0-9] y){4,}", temperature=0.6, seed=19, at=12, logprobs=1),
    asked("A list:", json={"type": "array", "items": {"const": "word"}, "minItems": 9}, at=13),
    asked("Ends:", regex="(no ){5}", ignore_eos=True, at=14),
]
ANYWHERE = [n for n, one in enumerate(DRAFTED) if one[0] in ("A tree:", "A call:", "An object:")]
NGRAM = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
DRAFTERS = {"ngram": NGRAM, "draft_model": {"method": "draft_model"}}


def with_drafts(tiny: str, drafter: str) -> dict[str, Any]:
    """The draft model is the target, without its grammars."""
    config = {"num_speculative_tokens": 3} | DRAFTERS[drafter]
    if drafter == "draft_model":
        config["model"] = tiny
    return OPTIONS | {
        "speculative_config": config,
        "per_request_spec_decode_metrics": "detailed",
    }


def num_held(completions: list[Any]) -> list[int]:
    """Drafts that held."""
    return [sum(one["drafts"][1]) for ones in completions for one in ones]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_beside_drafts(oracle: EngineChild, fused: EngineChild, tiny: str, drafter: str) -> None:
    """With tables that a token may leave (``ANYWHERE``) all steps are stock, with others few."""
    options = with_drafts(tiny, drafter)
    want = oracle.call(structured_child.run, tiny, options, DRAFTED)
    if drafter == "ngram":
        assert sum(num_held(want["completions"][-4:])) > 20
    for decode_steps in (64, "auto"):
        have = fused.call(structured_child.run, tiny, options, DRAFTED, decode_steps)
        assert_same(have, want, DRAFTED)
        assert have["turns"][OUTSIDE] > 10
        kept = [one for n, one in enumerate(DRAFTED) if n not in ANYWHERE]
        have = fused.call(structured_child.run, tiny, options, kept, decode_steps)
        counts = have["counts"]
        assert counts["steps"] > 1.5 * counts["windows"] > 0, counts
        assert counts["steps"] > 2 * sum(counts["stock_steps"].values()), counts
        if drafter == "ngram":
            assert sum(num_held(have["completions"])) > 20


def test_beside_drafts_on_the_stand_in(oracle: EngineChild, tiny: str) -> None:
    """A GPU's memory and streams, and Triton's kernels, interpreted."""
    some = [DRAFTED[n] for n in (0, 3, 4, -4, -3, -1)]
    options = with_drafts(tiny, "ngram")
    want = oracle.call(structured_child.run, tiny, options, some)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        child = StandInChild(tiny, {"ops": "triton", "capture_sizes": (4, 16, 32)}, **options)
        have = child.call(structured_child.answer, some, 64)
        child.close()
    assert_same(have, want, some)
    assert have["counts"]["steps"] > 1.5 * have["counts"]["windows"] > 0
    assert set(have["counts"]["stock_steps"]) == {"prefill"}


def test_drafts_that_are_not_followed(oracle: EngineChild, fused: EngineChild, tiny: str) -> None:
    """The control: each draft's mask is that of the state before all of them."""
    options = with_drafts(tiny, "ngram")
    want = oracle.call(structured_child.run, tiny, options, DRAFTED[-4:])
    have = fused.call(structured_child.run_with_one_mask, tiny, options, DRAFTED[-4:])
    tokens, others = (
        [one["token_ids"] for ones in result["completions"] for one in ones]
        for result in (have, want)
    )
    assert tokens != others


def test_texts_obey(expected: dict[str, Any]) -> None:
    """What is compared above is what was asked for."""
    whole = [expected["completions"][n][0] for n in WHOLE]
    ended = [json.loads(one["text"]) for one in whole if one["finish_reason"] == "stop"]
    assert len(ended) >= 2
    for person in ended:
        validate(person, PERSON)


# A window's batch has a graph of its own size, or one row of padding.
GRAPHS = {"capture_sizes": (1, 3, 4, 32)}


@pytest.fixture(scope="module")
def stand_in(tiny: str) -> Iterator[StandInChild]:
    child = StandInChild(tiny, GRAPHS, **OPTIONS)
    yield child
    child.close()


@pytest.mark.parametrize(
    ("form", "decode_steps", "seed"),
    [("while", 64, None), ("unrolled", 7, 1), ("replay", "auto", 2), ("eager", 7, None)],
)
def test_on_the_stand_in(
    stand_in: StandInChild,
    expected: dict[str, Any],
    form: str,
    decode_steps: object,
    seed: int | None,
) -> None:
    """A GPU's memory and streams, as late as they may be or at random times: the tables come
    while windows run, a request's state changes in recorded steps."""
    args = (form, seed, REQUESTS, decode_steps)
    have = stand_in.call(structured_child.run_on_the_stand_in, *args)
    assert have["loop"] == form
    assert_same(have, expected)
    counts = have["counts"]
    assert counts["steps"] > 1.5 * counts["windows"] > 0, counts
    assert set(counts["stock_steps"]) == {"prefill"}, have["turns"]
    assert (have["replays"] > 0) == (form != "eager")


def test_tables_that_never_come(stand_in: StandInChild) -> None:
    """The control: the device masks with what it has, and vLLM's matcher refuses the token."""
    requests = [asked("Letters:", regex="[a-m]{9}"), asked("Once upon a time", max_tokens=9)]
    have = stand_in.call(structured_child.answer_without_tables, requests)
    [constrained], [free] = have["completions"]
    assert (constrained["finish_reason"], free["finish_reason"]) == ("error", "length")
    assert have["refused"] == 1


def test_preemption(fused: EngineChild, tiny: str, expected: dict[str, Any]) -> None:
    """A request that comes back is in its grammar where it was."""
    few = OPTIONS | {"max_model_len": 96, "num_gpu_blocks_override": 5}
    for decode_steps in (7, 64):
        have = fused.call(structured_child.run, tiny, few, REQUESTS, decode_steps)
        assert have["preemptions"] > 0
        assert_same(have, expected)


def test_synchronous_scheduling(fused: EngineChild, tiny: str, expected: dict[str, Any]) -> None:
    options = OPTIONS | {"async_scheduling": False}
    assert_same(fused.call(structured_child.run, tiny, options, REQUESTS, 7), expected)


@pytest.mark.parametrize(("decode_steps", "states"), [(3, 12), (16, 30)])
def test_what_lies_beyond_the_tables(
    fused: EngineChild, tiny: str, expected: dict[str, Any], decode_steps: int, states: int
) -> None:
    """Tables of a few states: requests leave them in a window, and go on in stock steps."""
    call = partial(fused.call, structured_child.run_with_few_states, tiny, OPTIONS, REQUESTS)
    have = call(decode_steps, states)
    assert_same(have, expected)
    turns = have["turns"]
    assert turns[OUTSIDE] > 5, turns
    assert have["counts"]["steps"] > have["counts"]["windows"] > 0
    assert have["refused"] == 0


def test_full_tables(fused: EngineChild, tiny: str, expected: dict[str, Any]) -> None:
    """Where there is no room a grammar is masked by the host; idle ones make way."""
    have = fused.call(structured_child.run_with_full_tables, tiny, OPTIONS, REQUESTS, 7, 300)
    assert_same(have, expected)
    assert have["turns"]["structured output: its tables are full"] > 0, have["turns"]
    assert have["evicted"] > 0


def test_a_device_that_masks_nothing(
    fused: EngineChild, tiny: str, expected: dict[str, Any]
) -> None:
    """The control. vLLM's matcher refuses the tokens: their requests fail, and no others."""
    have = fused.call(structured_child.run_without_masks, tiny, OPTIONS, REQUESTS, 7)
    failed = 0
    for (_, fields, _), ours, theirs in zip(
        REQUESTS, have["completions"], expected["completions"], strict=True
    ):
        if "structured_outputs" in fields:
            failed += sum(one["finish_reason"] == "error" for one in ours)
        else:
            assert [one["token_ids"] for one in ours] == [one["token_ids"] for one in theirs]
    assert failed > 8
    assert have["refused"] == failed


@pytest.mark.parametrize(
    "backend", ("guidance", "outlines")
)  # the fourth asks for vLLM's CUDA build
def test_other_backends(oracle: EngineChild, fused: EngineChild, tiny: str, backend: str) -> None:
    """They know other automata: stock steps, by name."""
    options = OPTIONS | {"structured_outputs_config": {"backend": backend}}
    requests = [asked("A number:", regex=r"\d{3}-[a-c]{5}"), REQUESTS[1]]
    want = oracle.call(structured_child.run, tiny, options, requests)
    have = fused.call(structured_child.run, tiny, options, requests, 7)
    for ours, theirs in zip(have["completions"], want["completions"], strict=True):
        assert ours[0]["token_ids"] == theirs[0]["token_ids"]
    [reason] = [r for r in have["turns"] if r.startswith("structured output")]
    assert reason.startswith("structured output by "), reason


@pytest.fixture(scope="module")
def thinking(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a tokenizer that has tokens around a thought."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("thinking") / "model"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = Path(folder, file).read_text()
        for special, token in zip(THOUGHT, ("<think>", "</think>"), strict=True):
            text = text.replace(special, token)
        Path(folder, file).write_text(text)
    return str(folder)


THOUGHT = ("<issue_start>", "<issue_comment>")  # special tokens of the bundled tokenizer
END = 9


@pytest.mark.parametrize("parser", ("deepseek_r1", "qwen3"))
def test_after_reasoning(
    oracle: EngineChild, fused: EngineChild, thinking: str, parser: str
) -> None:
    """The grammar begins after the token that ends the thought, in the middle of a window."""
    config = {"backend": "xgrammar", "reasoning_parser": parser}
    options = OPTIONS | {"structured_outputs_config": config}
    requests = [
        asked("Why?", json=PERSON, temperature=1.0, seed=n, at=n, logit_bias={END: 9.0})
        for n in range(6)
    ]
    want = oracle.call(structured_child.run, thinking, options, requests)
    have = fused.call(structured_child.run, thinking, options, requests, 16)
    ends = []
    for ours, theirs in zip(have["completions"], want["completions"], strict=True):
        assert ours[0]["token_ids"] == theirs[0]["token_ids"]
        ends.append(ours[0]["token_ids"].index(END) if END in ours[0]["token_ids"] else -1)
    assert max(ends) > 2, ends
    assert set(have["counts"]["stock_steps"]) == {"prefill"}, have["counts"]
