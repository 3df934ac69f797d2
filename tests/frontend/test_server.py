"""Servers whose every text is known: streams through vLLM's parsers, and what vLLM counts."""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from frontend import scripted
from frontend.stream import TOOL, one_by_one, tokenizer, tokens
from serving import KV_CACHE, Server

from fusedstep.explain import explain

# Length of the prompt after which the model says it.
AT = {"tool:deepseek_v31": 1, "tool:step3": 60}
WORDS_AT = 140
WORDS = " One two three four five six seven eight nine ten eleven twelve thirteen fourteen" * 3
ARGS = ("--dtype=float32", "--enforce-eager", "--max-num-seqs=4", "--served-model-name=m")
CALLS = ("--enable-auto-tool-choice", "--tool-call-parser")
STARTS = {
    "stock": ("--stock", *CALLS, "deepseek_v31"),
    "deepseek_v31": (*CALLS, "deepseek_v31"),
    "step3": ("--api-server-count=2", *CALLS, "step3"),
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """All of them, started side by side. vLLM's several API servers do not end without noise."""
    folder = tmp_path_factory.mktemp("scripted")
    words = tokenizer().encode(WORDS, add_special_tokens=False)
    scripts = {length: tokens(name) for name, length in AT.items()} | {WORDS_AT: words}
    scripted.make(folder / "model", scripts)
    with ExitStack() as stack:
        found = {}
        for name, args in STARTS.items():
            server = Server(folder / name, str(folder / "model"), *ARGS, *KV_CACHE, *args)
            stack.callback(server.kill)
            found[name] = server
        for server in found.values():
            server.wait_until_up()
        yield found
        for server in (found["stock"], found["deepseek_v31"]):
            assert server.end(signal.SIGINT, group=False) in (0, 130)


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=60)


def chat(server: Server, length: int, **fields: Any) -> list[Any]:
    """A streamed chat's events."""
    messages: Any = [{"role": "user", "content": scripted.prompt(length)}]
    tools: Any = [TOOL]
    with client(server) as one:
        stream: Any = one.chat.completions.create(
            model="m", messages=messages, tools=tools, temperature=0, stream=True, **fields
        )
        return list(stream)


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


def complete(server: Server, **fields: Any) -> Any:
    """What comes after the prompt before WORDS."""
    with client(server) as one:
        prompt = scripted.prompt(WORDS_AT)
        answer: Any = one.completions.create(model="m", prompt=prompt, temperature=0, **fields)
        return list(answer) if fields.get("stream") else answer


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
    before = explain(servers["deepseek_v31"].url)
    words = tokenizer().encode(WORDS, add_special_tokens=False)
    stop = " eleven"
    until_stop = next(n for n in range(len(words)) if stop in tokenizer().decode(words[:n]))
    for fields, count in (
        ({"max_tokens": 30}, 30),
        ({"max_tokens": 20, "n": 2}, 40),
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
        in_tokens = "token" in family and "time" not in family
        counted = kind == "counter" or name.endswith("_count")
        if counted or (kind == "histogram" and in_tokens):
            found[f"{name}{{{labels}}}"] = float(value)
    return found


def requests(server: Server) -> None:
    """Known ones, one after the other."""
    complete(server, max_tokens=17)
    complete(server, max_tokens=30, stream=True)
    complete(server, max_tokens=60, stop=[" nine"])
    complete(server, max_tokens=60, stop=[" nine"], stream=True)
    complete(server, max_tokens=12, n=2, stream=True)
    complete(server, max_tokens=12, logprobs=1)
    chat(server, AT["tool:deepseek_v31"])


def test_vllm_counts_what_stock_counts(servers: dict[str, Server]) -> None:
    found = {}
    for name in ("stock", "deepseek_v31"):
        before = counts(servers[name])
        requests(servers[name])
        after = counts(servers[name])
        found[name] = {key: value - before.get(key, 0) for key, value in after.items()}
    assert found["stock"]['vllm:generation_tokens_total{engine="0",model_name="m"}'] > 100
    assert found["deepseek_v31"] == found["stock"]
