"""The soak's clients: each asks, checks the answer, and asks again until the time is up."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from fusedstep.bench.soak.requests import (
    COMPLETIONS,
    FIXED,
    SCHEMA,
    Request,
    long_request,
    malformed,
    random_request,
)

ANSWER_SECONDS = 120.0  # a request that takes longer is lost
PHASE_SECONDS = 5.0  # with and without streams in turn: streams keep windows short
SHARES = {"fixed": 25, "random": 40, "dropped": 17, "half sent": 3, "malformed": 15}


class Wrong(Exception):
    """An answer that is not what the request asked for."""


@dataclass
class Answer:
    """One answer, streamed or not: per choice its text, why it ended, its logprobs."""

    texts: list[str]
    ends: list[str | None]
    num_logprobs: list[int]
    completion_tokens: int = 0
    events: int = 0  # of a stream, with text or tokens


@dataclass
class Tally:
    """Counts of outcomes, by kind of request."""

    asked: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)  # as its kind should
    problems: list[str] = field(default_factory=list)
    texts_changed: int = 0
    stream_tokens: int = 0
    stream_events: int = 0

    @property
    def lost(self) -> int:
        """Requests that were asked and did not end as they should."""
        return self.asked.total() - self.ended.total()


class Load:
    """``clients`` requests in flight at any time. Everything random comes from ``seed``."""

    def __init__(self, url: str, model: str, clients: int, seed: int) -> None:
        self.url, self.model, self.clients = url, model, clients
        self.rng = random.Random(seed)
        self.tally = Tally()
        self.texts: dict[str, list[str]] = {}

    async def run(self, seconds: float) -> None:
        """Take the fixed requests' texts one by one, then load the server for ``seconds``."""
        async with session(self.url) as self.session:
            for name, request in FIXED.items():
                self.texts[name] = (await self.ask(request, stream=False)).texts
            self.began = time.monotonic()
            await asyncio.gather(*(self._client(seconds) for _ in range(self.clients)))

    async def _client(self, seconds: float) -> None:
        acts = {
            "fixed": self._fixed,
            "random": self._random,
            "dropped": self._dropped,
            "half sent": self._half_sent,
            "malformed": self._malformed,
        }
        while time.monotonic() - self.began < seconds:
            (kind,) = self.rng.choices(list(SHARES), list(SHARES.values()))
            self.tally.asked[kind] += 1
            try:
                await acts[kind]()
            except (Wrong, aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                self.tally.problems.append(f"{kind}: {type(error).__name__}: {error}")
            else:
                self.tally.ended[kind] += 1

    def _streams(self) -> bool:
        """Half of the requests in every other phase."""
        mixed = (time.monotonic() - self.began) // PHASE_SECONDS % 2 == 0
        return mixed and self.rng.random() < 0.5

    async def _fixed(self) -> None:
        name = self.rng.choice(list(FIXED))
        answer = await self.ask(FIXED[name], self._streams())
        check(FIXED[name], answer)
        if answer.texts != self.texts[name]:
            self.tally.texts_changed += 1
            raise Wrong(f"{name}: {answer.texts} is not {self.texts[name]}")

    async def _random(self) -> None:
        request = random_request(self.rng)
        check(request, await self.ask(request, self._streams()))

    async def _dropped(self) -> None:
        """The client hangs up: while it waits, before the first token, or in mid-stream."""
        request, stream = long_request(self.rng), self.rng.random() < 0.6
        try:
            async with asyncio.timeout(self.rng.choice((0.01, 0.1, 0.5, 2))):
                await self.ask(request, stream)
        except TimeoutError:
            return  # aiohttp has closed the connection

    async def _half_sent(self) -> None:
        """The client hangs up before the server has the whole request."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f'{head}Content-Length: 500\r\n\r\n{{"model": "'.encode())
        await writer.drain()
        await asyncio.sleep(self.rng.choice((0, 0.1)))
        writer.close()

    async def _malformed(self) -> None:
        path, body = malformed(self.rng, self.model)
        headers = {"Content-Type": "application/json"}
        async with self.session.post(path, data=body, headers=headers) as response:
            said = await response.text()
            if not 400 <= response.status < 500:
                raise Wrong(f"{path} {body[:200]!r} got {response.status}: {said[:200]}")

    async def ask(self, request: Request, stream: bool) -> Answer:
        """The answer to a request. Raises Wrong for a status, an error or an end that is not it."""
        body = {"model": self.model, **request.body, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        answer = Answer(*([x] * request.choices for x in ("", None, 0)))  # type: ignore[arg-type]
        async with self.session.post(request.path, json=body) as response:
            if response.status != 200:
                raise Wrong(f"{body} got {response.status}: {(await response.text())[:200]}")
            if not stream:
                _add(answer, await response.json())
                return answer
            async for event in events(response):
                _add(answer, event)
        self.tally.stream_tokens += answer.completion_tokens
        self.tally.stream_events += answer.events
        return answer


def session(url: str) -> aiohttp.ClientSession:
    """Without a bound on connections, each of one request (a server may close an idle one just
    when the next request is sent), and with room for long lines."""
    return aiohttp.ClientSession(
        url,
        timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS),
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        read_bufsize=1 << 20,
    )


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream. Raises Wrong where it has an error, or ends without its end mark."""
    async for line in response.content:
        text = line.decode().strip().removeprefix("data: ")
        if text == "[DONE]":
            return
        if text:
            event: dict[str, Any] = json.loads(text)
            if "error" in event:
                raise Wrong(f"an error in a stream: {event['error']}")
            yield event
    raise Wrong("a stream was cut off")


def _add(answer: Answer, part: dict[str, Any]) -> None:
    """A whole answer, or an event of a stream."""
    if part.get("usage"):
        answer.completion_tokens = part["usage"]["completion_tokens"]
    for choice in part["choices"]:
        index = choice["index"]
        message = choice.get("message") or choice.get("delta") or {}
        text = choice.get("text") or message.get("content") or ""
        logprobs = choice.get("logprobs") or {}
        tokens = logprobs.get("content") or logprobs.get("tokens") or []
        answer.texts[index] += text
        answer.num_logprobs[index] += len(tokens)
        answer.ends[index] = choice.get("finish_reason") or answer.ends[index]
        answer.events += bool(text or tokens)


def check(request: Request, answer: Answer) -> None:
    """Raises Wrong for what the request did not ask for."""
    asked = request.choices * request.max_tokens
    if any(end not in ("stop", "length") for end in answer.ends):
        raise Wrong(f"{request.body} ended with {answer.ends}")
    if answer.completion_tokens > asked:
        raise Wrong(f"{request.body}: {answer.completion_tokens} tokens are too many")
    full = all(end == "length" for end in answer.ends)
    if full and answer.completion_tokens != asked:
        raise Wrong(f"{request.body}: {answer.completion_tokens} tokens, not {asked}")
    logprobs = sum(answer.num_logprobs)
    if request.body.get("logprobs") and full and logprobs != answer.completion_tokens:
        raise Wrong(f"{request.body}: {logprobs} logprobs of {answer.completion_tokens} tokens")
    for text, end in zip(answer.texts, answer.ends, strict=True):
        if any(stop in text for stop in request.body.get("stop", ())):
            raise Wrong(f"{request.body}: a stop string is in {text!r}")
        if request.schema and end == "stop" and set(json.loads(text)) != set(SCHEMA["required"]):
            raise Wrong(f"not of its schema: {text!r}")


async def hang_up_or_error(load: Load, streaming: asyncio.Event) -> str | None:
    """A long stream, into which a fault comes after ``streaming`` is set.

    What the client was told (an error, or a stream cut off); None if its stream ended as if
    nothing had happened.
    """
    request = Request(COMPLETIONS, {"prompt": "Once", "max_tokens": 700, "ignore_eos": True})
    body = {"model": load.model, "stream": True, **request.body}
    async with session(load.url) as own:
        try:
            async with own.post(request.path, json=body) as response:
                async for _ in events(response):
                    streaming.set()
        except (Wrong, aiohttp.ClientError, OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"[:200]
    return None
