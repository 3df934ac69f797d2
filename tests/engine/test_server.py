"""The OpenAI server over windows, through the openai client: real requests, real weights."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import KV_CACHE, SMALL, Server, wait_for

from fusedstep.explain import explain

MODEL = "SmolLM2-135M-Instruct"
PROMPT = "Once upon a time, in a village by the sea,"
CHAT: Any = [{"role": "user", "content": "What is the capital of France?"}]
RUNNING = "vllm:num_requests_running"


def complete(client: openai.OpenAI, prompt: str = PROMPT, **fields: Any) -> Any:
    """A completion, greedy unless told otherwise."""
    fields = {"temperature": 0, "max_tokens": 24} | fields
    return client.completions.create(model=MODEL, prompt=prompt, **fields)


def test_the_start_is_told_in_a_few_lines(server: Server) -> None:
    """Stages, one panel, a request that works; all else is in vLLM's log, and nothing alarms."""
    wait_for("the panel is there", lambda: "curl " in server.log.read_text(), 10)
    text = server.log.read_text()
    assert len(text.splitlines()) < 30 and "WARNING" not in text and "INFO" not in text
    stages = re.findall(r"^\[ +\d+\.\d s\] (.*)$", text, re.MULTILINE)
    assert stages[0] == "loading vLLM" and "loading the weights" in stages
    assert text.count("fusedstep serve is ready") == 1 and f"{server.url}/v1" in text
    log = server.vllm_log()
    assert log is not None and "Application startup complete" in log.read_text()
    assert "Using custom scheduler class" not in log.read_text()
    curl = shlex.split(next(line for line in text.splitlines() if line.startswith("curl ")))
    url, header, body = curl[2], curl[4], curl[6]
    request = urllib.request.Request(url, body.encode(), dict([header.split(": ")]))
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert "Paris" in json.load(answer)["choices"][0]["text"]


def test_answers_to_the_name_of_the_bundled_model(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]


@pytest.mark.parametrize("max_tokens", (1, 2, 70))
def test_completion_streams_what_it_answers(client: openai.OpenAI, max_tokens: int) -> None:
    fields = {"max_tokens": max_tokens, "extra_body": {"ignore_eos": True}}
    whole = complete(client, **fields)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}, **fields))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text != ""
    assert choices[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert all(choice.finish_reason is None for choice in choices[:-1])
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == max_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + max_tokens
    assert whole.usage.prompt_tokens == 12


def test_chat_streams_what_it_answers(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": 64}
    whole = client.chat.completions.create(**fields)
    chunks = list(
        client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == whole.choices[0].message.content != ""
    assert choices[-1].finish_reason == whole.choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage
    assert 1 < whole.usage.completion_tokens < 64


def test_more_requests_than_fit_get_the_answers_they_get_alone(client: openai.OpenAI) -> None:
    prompts = [f"A list of {n} animals that live in the sea:" for n in range(2, 14)]
    lengths = [8 + n for n in range(12)]
    alone = [
        complete(client, p, max_tokens=n).choices[0].text
        for p, n in zip(prompts, lengths, strict=True)
    ]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p, n: complete(client, p, max_tokens=n), prompts, lengths))
    assert [answer.choices[0].text for answer in together] == alone
    assert [answer.usage.completion_tokens for answer in together] == lengths


def test_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=40).choices[0].text
    stop = text.split()[12]
    answer = complete(client, max_tokens=40, stop=[stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40
    chunks = list(complete(client, max_tokens=40, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_logprobs_of_a_greedy_completion_name_its_tokens(client: openai.OpenAI) -> None:
    choice = complete(client, max_tokens=20, logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 20
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert logprob <= 0
        assert top[token] == logprob == max(top.values())


def test_logprobs_of_a_chat_are_sorted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    for token in content:
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (top.logprob for top in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token


def test_seed_repeats_itself_alone_and_in_company(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = complete(client, temperature=1, top_p=0.95, max_tokens=30, seed=seed)
        return str(answer.choices[0].text)

    alone = {seed: sample(seed) for seed in (1, 2, 3)}
    assert len(set(alone.values())) == 3
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(sample, (1, 2, 3, 3, 2, 1)))
    assert together == [alone[seed] for seed in (1, 2, 3, 3, 2, 1)]


def test_two_choices_of_one_prompt(client: openai.OpenAI) -> None:
    answer = complete(client, n=2, temperature=1, seed=5, extra_body={"ignore_eos": True})
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.usage.completion_tokens == 48
    assert {choice.finish_reason for choice in answer.choices} == {"length"}


@pytest.mark.parametrize(
    "fields",
    (
        pytest.param({"temperature": -1}, id="temperature"),
        pytest.param({"extra_body": {"top_p": 2}}, id="top_p"),
        pytest.param({"max_tokens": -3}, id="max_tokens"),
        pytest.param({"prompt": "far too long " * 2000}, id="prompt"),
        pytest.param({"extra_body": {"repetition_penalty": -1}}, id="penalty"),
    ),
)
def test_wrong_request_is_refused_and_the_server_goes_on(
    client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError):
        complete(client, **fields)
    assert complete(client, max_tokens=3).usage.completion_tokens == 3


def test_client_that_goes_away_frees_its_request(server: Server, client: openai.OpenAI) -> None:
    body = json.dumps(
        {"model": MODEL, "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
        wait_for("the request runs", lambda: server.gauge(RUNNING) == 1, 5)
    began = time.monotonic()
    wait_for("the request is freed", lambda: server.gauge(RUNNING) == 0, 5)
    alone = time.monotonic() - began
    assert complete(client, max_tokens=3).usage.completion_tokens == 3
    assert alone < 5


def test_request_that_arrives_does_not_wait_for_a_window(client: openai.OpenAI) -> None:
    """A long request without a stream decodes in windows of 64 steps; others arrive.

    If they waited for its windows, each first token would take up to 64 steps. One hiccup of the
    machine is forgiven.
    """
    seconds: dict[str, float] = {}

    def long_request() -> None:
        began = time.monotonic()
        complete(client, max_tokens=500, extra_body={"ignore_eos": True})
        seconds["long"] = time.monotonic() - began

    thread = threading.Thread(target=long_request)
    thread.start()
    time.sleep(1)
    first_tokens = []
    for n in range(8):
        began = time.monotonic()
        with complete(client, f"{n} is", stream=True, max_tokens=2) as stream:
            next(iter(stream))
            first_tokens.append(time.monotonic() - began)
            list(stream)
        time.sleep(0.1)  # a long window begins
    assert thread.is_alive()
    thread.join()
    assert sorted(first_tokens)[-2] < 32 * seconds["long"] / 500, (first_tokens, seconds)


def test_windows_are_counted_where_vllm_shows_its_metrics(
    server: Server, client: openai.OpenAI
) -> None:
    before = explain(server.url)
    answer = complete(client, max_tokens=129, extra_body={"ignore_eos": True})
    wait_for("the counts are told", lambda: explain(server.url).tokens > before.tokens, 5)
    new = explain(server.url).since(before, 1.0)
    assert answer.usage.completion_tokens == new.tokens == 129
    assert new.windows >= 2 and new.steps == 128
    assert sum(new.limits.values()) == new.windows
    assert sum(new.one_step_turns.values()) == 1  # the prefill
    assert 0 < new.host_ms_per_token < 100


def test_ctrl_c_ends_a_busy_server(tmp_path: Path, model: str) -> None:
    """Options before MODEL, and SIGINT to the whole group, as a terminal sends it.

    Threads as vLLM has them, whatever the tests' are: on their own cores.
    """
    args = ("--decode-steps=8", *SMALL, *KV_CACHE, model, "-O0")
    threads = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
    env = {name: value for name, value in os.environ.items() if name not in threads}
    server = Server(tmp_path / "log", *args, env=env)
    try:
        server.wait_until_up()
        below = server.main.children(recursive=True)
        (worker,) = (p for p in below if "".join(p.cmdline()).startswith("VLLM::Worker"))
        bound, allowed = map(os.sched_getaffinity, (worker.pid, 0))
        assert bound < allowed or len(allowed) == 1
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
            client.completions.create(
                model=model, prompt=PROMPT, max_tokens=900, stream=True
            ) as stream,
        ):
            next(iter(stream))
            assert server.end(signal.SIGINT, group=True) in (0, 130)
    finally:
        server.kill()


def test_sigterm_ends_a_server_that_is_starting(tmp_path: Path, model: str) -> None:
    server = Server(tmp_path / "log", model, *SMALL, *KV_CACHE)
    try:
        wait_for("its engine starts", lambda: len(server.main.children(recursive=True)) > 1, 60)
        assert server.end(signal.SIGTERM, group=False) in (0, 130)
    finally:
        server.kill()
