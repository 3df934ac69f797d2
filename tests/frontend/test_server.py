"""Streams through vLLM's parsers on servers whose every text is known."""

from __future__ import annotations

import json
from typing import Any

import pytest
from frontend.scripted_servers import AT, chat
from frontend.stream import one_by_one
from serving import Server


def said(events: list[Any]) -> dict[str, Any]:
    """Content and calls, put together as a client does."""
    whole: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}}
    for event in events:
        delta = event.choices[0].delta
        whole["content"] += delta.content or ""
        for call in delta.tool_calls or ():
            known = whole["calls"].setdefault(call.index, ["", ""])
            known[0] += call.function.name or ""
            known[1] += call.function.arguments or ""
    return whole


@pytest.mark.parametrize("parser", ("deepseek_v31", "step3"))
def test_streamed_tool_calls_lose_nothing(servers: dict[str, Server], parser: str) -> None:
    """Several times: windows are cut differently while the time of a step is not known."""
    name = f"tool:{parser}"
    want = one_by_one(name)[1]
    for _ in range(5):
        events = chat(servers[parser], AT[name])
        assert said(events) == want
        assert all(json.loads(arguments) for _, arguments in want["calls"].values())
        assert events[-1].choices[0].finish_reason == "tool_calls"
