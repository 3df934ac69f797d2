"""Servers whose every text is known: streams through vLLM's parsers, and what vLLM counts."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

import pytest
from frontend.scripted_servers import AT, WORDS, chat, complete
from frontend.stream import one_by_one, tokenizer
from serving import Server, wait_for

from fusedstep.explain import explain

# vLLM wants more than one answer sampled: with top_k = 1 they are known all the same.
TWO: Any = {"n": 2, "temperature": 1, "extra_body": {"top_k": 1}}


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


def test_stream_has_an_event_per_token(servers: dict[str, Server]) -> None:
    """Also of a choice among several, with logprobs, and up to a stop string."""
    complete(servers["deepseek_v31"], max_tokens=2)  # before it there are no counts
    before = explain(servers["deepseek_v31"].url)
    words = tokenizer().encode(WORDS, add_special_tokens=False)
    stop = " eleven"
    until_stop = next(n for n in range(len(words)) if stop in tokenizer().decode(words[:n]))
    for fields, count in (
        ({"max_tokens": 30}, 30),
        ({"max_tokens": 20, **TWO}, 40),
        ({"max_tokens": 30, "logprobs": 2}, 30),
        ({"max_tokens": 30, "stop": [stop]}, until_stop),
    ):
        ours, theirs = (
            [c for e in complete(servers[name], stream=True, **fields) for c in e.choices]
            for name in ("deepseek_v31", "stock")
        )
        assert len(ours) == count
        for index in range(fields.get("n", 1)):
            assert texts(ours, index) == texts(theirs, index)
    after = explain(servers["deepseek_v31"].url)
    assert after.windows > before.windows


def test_each_of_several_api_servers_explains_the_engine(servers: dict[str, Server]) -> None:
    """Whichever of the two a connection reaches."""
    url = f"{servers['step3'].url}/fusedstep/explain"

    def windows() -> int:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return int(json.loads(answer.read())["windows"])
        except urllib.error.HTTPError as error:
            assert error.code == 404, error  # it has not been told yet
            return 0

    complete(servers["step3"], max_tokens=30)
    wait_for("the counts are told", lambda: all(windows() for _ in range(12)), 10)


def texts(choices: list[Any], index: int) -> tuple[str, list[Any], str]:
    """A choice's text, the tokens of its logprobs and its end, whatever its events were.

    (Stock's server joins tokens that wait for a client.)
    """
    found = [choice for choice in choices if choice.index == index]
    named = [token for c in found if c.logprobs for token in c.logprobs.tokens]
    return "".join(choice.text for choice in found), named, found[-1].finish_reason


def counts(server: Server) -> dict[str, float]:
    """vLLM's counters, and the counts and buckets of its histograms of tokens, by name."""
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=10).read().decode()
    found: dict[str, float] = {}
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    for name, labels, value in re.findall(r"^(vllm:\w+){(.*)} (\S+)$", text, re.MULTILINE):
        family = re.sub(r"_(count|bucket|sum|total)$", "", name)
        kind = kinds.get(name) or kinds.get(family)
        in_tokens = "token" in family and not family.endswith("_seconds")
        counted = kind == "counter" or name.endswith("_count")
        if counted or (kind == "histogram" and in_tokens):
            found[f"{name}{{{labels}}}"] = float(value)
    return found


def known(server: Server) -> None:
    """Requests of known length, one after the other."""
    complete(server, max_tokens=17)
    complete(server, max_tokens=30, stream=True)
    complete(server, max_tokens=12, stream=True, **TWO)
    complete(server, max_tokens=12, logprobs=1)
    chat(server, AT["tool:deepseek_v31"])


def stopped(server: Server) -> None:
    """Requests that the frontend ends at a stop string."""
    complete(server, max_tokens=60, stop=[" nine"])
    complete(server, max_tokens=60, stop=[" nine"], stream=True)


@pytest.mark.parametrize("ask", (known, stopped), ids=lambda ask: ask.__name__)
def test_vllm_counts_what_stock_counts(servers: dict[str, Server], ask: Any) -> None:
    found = {}
    for name in ("stock", "deepseek_v31"):
        before = counts(servers[name])
        ask(servers[name])
        after = counts(servers[name])
        found[name] = {key: value - before.get(key, 0) for key, value in after.items()}
        # Steps of the engine are a matter of time: how many requests a prefill took in, how far
        # the engine ran on until an abort reached it.
        found[name] = {k: v for k, v in found[name].items() if "iteration_tokens" not in k}
    assert found["stock"]['vllm:generation_tokens_total{engine="0",model_name="m"}'] > 10
    assert found["deepseek_v31"] == found["stock"]
