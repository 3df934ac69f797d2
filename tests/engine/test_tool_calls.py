"""Tool calls and JSON schemas through the openai client, in windows, as stock vLLM answers them.

The session's server is ours. ``-m exhaustive`` starts stock vLLM's beside it and compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from jsonschema import validate
from serving import KV_CACHE, SMALL, TOOLS, Server

from fusedstep.explain import explain

MODEL = "SmolLM2-135M-Instruct"
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
TIME: dict[str, Any] = {
    "type": "object",
    "properties": {"zone": {"type": "string", "pattern": "^[A-Z]{2,4}$"}},
    "required": ["zone"],
}
SCHEMAS = {"weather": WEATHER, "time": TIME}
CALLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in SCHEMAS.items()
]
ASKED: Any = [{"role": "user", "content": "What is the weather in Rome, and what time is it?"}]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
STRICT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "weather", "strict": True, "schema": WEATHER},
}
KINDS: dict[str, dict[str, Any]] = {
    "named": {"tools": CALLS, "tool_choice": NAMED},
    "required": {"tools": CALLS, "tool_choice": "required"},
    "auto": {"tools": CALLS, "tool_choice": "auto"},
    "parallel": {"tools": CALLS, "tool_choice": "required", "parallel_tool_calls": True},
    "schema": {"response_format": STRICT},
    "object": {"response_format": {"type": "json_object"}},
}


def ask(client: openai.OpenAI, kind: str, **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 80, "model": MODEL, "messages": ASKED} | fields
    return client.chat.completions.create(**fields, **KINDS[kind])


def events(client: openai.OpenAI, kind: str) -> list[Any]:
    """What each event of a stream says: text, pieces of tool calls, the end."""
    found = []
    for chunk in ask(client, kind, stream=True):
        for choice in chunk.choices:
            calls = [
                (call.index, call.function.name, call.function.arguments)
                for call in choice.delta.tool_calls or ()
                if call.function is not None
            ]
            found.append((choice.delta.content or "", calls, choice.finish_reason))
    return found


def joined(stream: list[Any]) -> tuple[str, dict[int, tuple[str, str]]]:
    """The text of a stream, and its calls: index -> (name, arguments)."""
    text, calls = "", {}
    for content, pieces, _ in stream:
        text += content
        for index, name, arguments in pieces:
            known = calls.get(index, ("", ""))
            calls[index] = (known[0] + (name or ""), known[1] + (arguments or ""))
    return text, calls


def parsed(arguments: str) -> Any:
    """vLLM writes arguments of a named tool anew, but not in a stream. Cut off, they are text."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


@pytest.mark.parametrize("kind", KINDS)
def test_streams_what_it_answers(client: openai.OpenAI, kind: str) -> None:
    answer = ask(client, kind).choices[0]
    text, calls = joined(events(client, kind))
    assert text == (answer.message.content or "")
    whole = [(c.function.name, c.function.arguments) for c in answer.message.tool_calls or ()]
    assert [(name, parsed(args)) for name, args in calls.values()] == [
        (name, parsed(args)) for name, args in whole
    ]
    if kind in ("named", "required", "parallel"):
        assert whole and answer.finish_reason in ("stop", "tool_calls", "length")
        for name, arguments in whole[:-1] if answer.finish_reason == "length" else whole:
            validate(json.loads(arguments), SCHEMAS[name])
    elif kind == "schema":
        validate(json.loads(text), WEATHER)


def test_tool_calls_decode_in_windows(client: openai.OpenAI, server: Server) -> None:
    """Together with free text: no turn of theirs is of one step for the grammar's sake."""
    before = explain(server.url)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda kind: ask(client, kind), ("named", "schema", "required", "auto")))
    new = explain(server.url).since(before)
    assert new.steps > 2 * new.windows > 0
    turns = {reason for reason, n in new.one_step_turns.items() if n and "structured" in reason}
    assert not turns, turns
    assert new.refused_tokens == 0


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Stock vLLM's own server."""
    server = Server(tmp_path_factory.mktemp("stock") / "log", "--stock", *SMALL, *KV_CACHE, *TOOLS)
    try:
        server.wait_until_up()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
            yield client
    finally:
        server.kill()


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_stock_streams_the_same(client: openai.OpenAI, stock: openai.OpenAI, kind: str) -> None:
    ours, theirs = events(client, kind), events(stock, kind)
    assert joined(ours) == joined(theirs)
    assert ours[-1][2] == theirs[-1][2]
