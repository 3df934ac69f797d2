"""Request fields at their extremes against a live server: nothing but answers and client errors.

By hand, with many more examples: FUSEDSTEP_FUZZ_EXAMPLES=2000 pytest tests/engine/test_limits.py
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Server

MODEL = "SmolLM2-135M-Instruct"
EXAMPLES = int(os.environ.get("FUSEDSTEP_FUZZ_EXAMPLES", "25"))
MOST = (1 << 63) - 1
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "One", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "One"}], "max_tokens": 3},
    "/v1/responses": {"input": "One", "max_output_tokens": 3},
}
# No field of the request, or one that only asks for more work than a test has time for.
LEFT_ALONE = {"model", "kv_transfer_params"}
INTEGERS = sorted(
    {n + d for n in (0, 128, 1024, 49152, 1 << 31, 1 << 32, 1 << 63, 1 << 64) for d in (-1, 0, 1)}
    | {-(1 << 31), -(1 << 63), -(1 << 63) - 1, 10**40}
)
NUMBERS = (-1e300, -2.0, -0.0, 1e-300, 1e-40, 1e-7, 0.5, 1.0, 2.0, 3e38, 1e39, 1e300)
ODD = (float("nan"), float("inf"), float("-inf"))
WORDS = ("", "a", " the", "\x00", "é" * 300, "{", "\ud800", "none", "auto", "required")


def numbers() -> Any:
    return st.sampled_from(NUMBERS) | st.sampled_from(ODD)


def words() -> Any:
    return st.sampled_from(WORDS) | st.text(max_size=8)


def anything() -> Any:
    leaf = st.none() | st.booleans() | st.sampled_from(INTEGERS) | numbers() | words()
    return st.recursive(
        leaf, lambda some: st.lists(some, max_size=3) | st.dictionaries(words(), some, max_size=3)
    )


def many(one: Any) -> Any:
    """Lists of a few different entries, and long ones."""
    few = st.lists(one, max_size=3)
    lengths = st.sampled_from((1, 128, 129, 1025))
    spread = st.tuples(st.sampled_from((0, 1, 48000)), lengths)
    long = spread.map(lambda pair: list(range(pair[0], pair[0] + pair[1])))
    return few | long | st.tuples(one, lengths).map(lambda pair: [pair[0]] * pair[1])


def values(schema: dict[str, Any], whole: dict[str, Any], depth: int = 0) -> Any:
    """Values of a field by its JSON schema, at the ends of their range and beyond."""
    if "$ref" in schema:
        if depth > 3:
            return anything()
        schema = whole["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    some = [values(one, whole, depth + 1) for one in schema.get("anyOf", schema.get("oneOf", ()))]
    if some:
        return st.one_of(some)
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]]) | words()
    if schema.get("type") == "array":
        return many(values(schema.get("items", {}), whole, depth + 1))
    if schema.get("type") == "object" and schema.get("properties") and depth <= 3:
        fields = {k: values(v, whole, depth + 1) for k, v in schema["properties"].items()}
        needed = {k: v for k, v in fields.items() if k in schema.get("required", ())}
        return st.fixed_dictionaries(
            needed, optional={k: v for k, v in fields.items() if k not in needed}
        )
    kinds = {
        "integer": st.sampled_from(INTEGERS),
        "number": numbers(),
        "boolean": st.booleans(),
        "string": words(),
        "null": st.none(),
        "object": st.dictionaries(words(), anything(), max_size=3)
        | many(st.just(0)).map(lambda ids: {str(i): 1.0 for i in ids if isinstance(i, int)}),
    }
    return kinds.get(schema.get("type", ""), anything())


@cache
def bodies(url: str) -> Any:
    """(path, body): a short request with one to three of its fields at an extreme."""
    whole = httpx.get(f"{url}/openapi.json", timeout=60).json()
    each = []
    for path, base in BASES.items():
        post = whole["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = post["schema"]["$ref"].rpartition("/")[2]
        properties = whole["components"]["schemas"][name]["properties"]
        fields = sorted(properties.keys() - LEFT_ALONE)
        assert len(fields) > 20
        drawn = st.lists(st.sampled_from(fields), min_size=1, max_size=3, unique=True).flatmap(
            lambda names, p=properties: st.fixed_dictionaries(
                {n: values(p[n], whole) for n in names}
            )
        )
        each.append(drawn.map(lambda more, p=path, b=base: (p, {"model": MODEL} | b | more)))
    return st.one_of(each)


def status(url: str, path: str, body: dict[str, Any]) -> int:
    """Of the answer; 0 if it takes longer than a test can wait: then the client goes away."""
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    headers = {"Content-Type": "application/json"}
    try:
        return httpx.post(f"{url}{path}", content=content, headers=headers, timeout=3).status_code
    except httpx.ReadTimeout:
        return 0


@pytest.fixture
def answers(client: openai.OpenAI) -> Any:
    """Does the server still answer?"""

    def answers() -> bool:
        answer = client.completions.create(model=MODEL, prompt="One", max_tokens=2)
        return answer.usage is not None and answer.usage.completion_tokens == 2

    return answers


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_extremes_are_answered_or_refused(server: Server, answers: Any, data: Any) -> None:
    path, body = data.draw(bodies(server.url))
    code = status(server.url, path, body)
    assert code == 0 or 200 <= code < 500, server.tail()
    assert answers()


IDS = list(range(2000))
WORD = "antidisestablishmentarianism "


@pytest.mark.parametrize(
    ("fields", "words"),
    (
        ({"allowed_token_ids": IDS[:1025]}, "allowed_token_ids can have at most 1024"),
        ({"logit_bias": dict.fromkeys(map(str, IDS[:1025]), 1)}, "logit_bias can have at most"),
        ({"stop_token_ids": IDS[100:228], "min_tokens": 2}, "at most 128 stop token ids"),
        ({"bad_words": [f"{n} {WORD * 3}" for n in range(60)]}, "at most 1024 tokens"),
        ({"seed": MOST, "n": 2, "temperature": 1}, "for each of the n choices"),
        ({"repetition_penalty": 1e300}, "repetition_penalty must be a 32-bit float"),
        ({"top_k": 1 << 70, "temperature": 1}, "top_k must be a 64-bit integer"),
        ({"priority": 1 << 70}, "less than or equal to 9223372036854775807"),
        ({"prompt": [1, 1 << 40]}, "out of vocabulary"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_runner_cannot_hold_is_refused(
    client: openai.OpenAI, answers: Any, fields: dict[str, Any], words: str
) -> None:
    """Most of these ended the engine before they were refused."""
    given = {"model": MODEL, "prompt": "One", "max_tokens": 3} | fields
    with pytest.raises(openai.BadRequestError, match=words):
        client.post("/completions", body=given, cast_to=object)
    if "prompt" not in fields:
        message = [{"role": "user", "content": "One"}]
        given = {k: v for k, v in given.items() if k != "prompt"} | {"messages": message}
        with pytest.raises(openai.BadRequestError, match=words):
            client.post("/chat/completions", body=given, cast_to=object)
    assert answers()


@pytest.mark.parametrize("fields", ({"request_id": "\ud800"}, {"stop": ["\ud800"]}), ids=str)
def test_text_that_no_message_can_hold_is_refused(server: Server, fields: dict[str, Any]) -> None:
    """Stock answers 500 with no word; the openai client cannot even send it."""
    body = {"model": MODEL, "max_tokens": 3} | fields
    message = [{"role": "user", "content": "One"}]
    assert status(server.url, "/v1/completions", body | {"prompt": "One"}) == 400
    assert status(server.url, "/v1/chat/completions", body | {"messages": message}) == 400
    if "stop" not in fields:
        assert status(server.url, "/v1/responses", {"input": "One"} | body) == 400


@pytest.mark.parametrize(
    "fields",
    (
        {"allowed_token_ids": IDS[:1024]},
        {"logit_bias": dict.fromkeys(map(str, IDS[:1024]), 1)},
        {"stop_token_ids": IDS[100:227], "min_tokens": 2},
        {"seed": MOST - 1, "n": 2, "temperature": 1},
        {"top_k": MOST, "temperature": 1},
        {"repetition_penalty": 3e38, "temperature": 1},
        {"repetition_penalty": 1e-37, "temperature": 1, "top_p": 0.5, "top_k": 7},
        {"max_tokens": 3, "min_tokens": 3},
    ),
    ids=lambda value: next(iter(value)),
)
def test_the_last_that_fits_is_answered(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": "One", "max_tokens": 3} | fields
    answer: Any = client.post("/completions", body=body, cast_to=object)
    assert 1 <= answer["usage"]["completion_tokens"] <= 6
