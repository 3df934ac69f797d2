"""A server of its own and a small load, to be traced."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp

from fusedstep import trace
from fusedstep.bench.progress import NO_PROGRESS, Progress
from fusedstep.bench.prompts import read_requests
from fusedstep.bench.server import Server
from fusedstep.errors import FusedStepError
from fusedstep.options import Options

CLIENTS = 6
MAX_TOKENS = (8, 160)  # of a request
PAUSE_SECONDS = 0.2  # of a client between two requests, on average
STREAMS = 0.05  # share of requests: while one streams, windows are short
LEAD_SECONDS = 0.3  # of the trace, before the first requests


def trace_model(
    options: Options,
    vllm_args: tuple[str, ...],
    seconds: float,
    progress: Progress = NO_PROGRESS,
) -> trace.Trace:
    """Serve a model, load it, and trace it for ``seconds``.

    Raises ConfigError where the server does not start, FusedStepError where it does not answer.
    """
    progress.say("starting the server")
    with Server("fusedstep", options, vllm_args) as server:
        server.wait_until_up()
        with urllib.request.urlopen(f"{server.url}/v1/models", timeout=30) as answer:
            model = json.load(answer)["data"][0]["id"]
        progress.say("warming up")
        asyncio.run(_ask_once(server.url, _body(random.Random(0), model)))
        progress.say(f"tracing for {seconds:g} s")
        over = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(asyncio.run, _load(server.url, model, over))
            try:
                result = trace.trace(server.url, seconds)
            finally:
                over.set()
            load.result()
        return result


async def _load(url: str, model: str, over: threading.Event) -> None:
    await asyncio.sleep(LEAD_SECONDS)
    async with _session(url) as session:
        clients = (_client(session, model, random.Random(n), over) for n in range(CLIENTS))
        await asyncio.gather(*clients)


async def _client(
    session: aiohttp.ClientSession, model: str, rng: random.Random, over: threading.Event
) -> None:
    while not over.is_set():
        await _ask(session, _body(rng, model))
        await asyncio.sleep(rng.expovariate(1 / PAUSE_SECONDS))


def _session(url: str) -> aiohttp.ClientSession:
    """Each connection of one request: a server may close an idle one when the next is sent."""
    return aiohttp.ClientSession(
        url,
        timeout=aiohttp.ClientTimeout(total=300),
        connector=aiohttp.TCPConnector(force_close=True),
    )


async def _ask_once(url: str, body: dict[str, Any]) -> None:
    async with _session(url) as session:
        await _ask(session, body)


async def _ask(session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
    try:
        async with session.post("/v1/completions", json=body) as response:
            text = await response.text()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise FusedStepError(f"the server does not answer ({type(error).__name__})") from None
    if response.status != 200:
        raise FusedStepError(f"the server refused a request ({response.status}): {text[:200]}")


def _body(rng: random.Random, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": rng.choice(_prompts()),
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": rng.randint(*MAX_TOKENS),
        "stream": rng.random() < STREAMS,
    }


@functools.cache
def _prompts() -> list[str]:
    return [request.prompt for request in read_requests(None, {})]
