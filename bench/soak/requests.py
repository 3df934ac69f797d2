"""The requests of the soak: fixed ones whose text must not change, random ones, and broken ones."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = "the sea a village once old and river stone of light they went to find some rain"
WORDS = TEXT.split()
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Ben", "Cleo"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Request:
    """One request of the OpenAI API, without "model" and "stream"."""

    path: str
    body: dict[str, Any]

    @property
    def choices(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def max_tokens(self) -> int:
        return int(self.body["max_tokens"])

    @property
    def schema(self) -> bool:
        return "response_format" in self.body


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Greedy, or with a seed: the same text whatever runs beside them.
FIXED: dict[str, Request] = {
    "greedy": Request(
        COMPLETIONS, {"prompt": "The capital of France is", "max_tokens": 40, "temperature": 0}
    ),
    "greedy chat": Request(
        CHAT, {"messages": _chat("Name three rivers."), "max_tokens": 32, "temperature": 0}
    ),
    "greedy, ignoring its end": Request(
        COMPLETIONS,
        {
            "prompt": "Q: Why is the sky blue?\nA:",
            "max_tokens": 64,
            "temperature": 0,
            "ignore_eos": True,
        },
    ),
    "greedy with logprobs": Request(
        COMPLETIONS,
        {"prompt": "1, 2, 3, 4,", "max_tokens": 24, "temperature": 0, "logprobs": 2},
    ),
    "greedy with a stop string": Request(
        COMPLETIONS,
        {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, "stop": [".", "\n"]},
    ),
    "seeded": Request(
        COMPLETIONS,
        {
            "prompt": "In the old village by the sea",
            "max_tokens": 40,
            "temperature": 1,
            "top_p": 0.9,
            "seed": 7,
        },
    ),
    "seeded, two choices": Request(
        CHAT,
        {
            "messages": _chat("Tell me about rain."),
            "max_tokens": 24,
            "temperature": 0.8,
            "n": 2,
            "seed": 3,
        },
    ),
    "seeded with penalties": Request(
        COMPLETIONS,
        {
            "prompt": "a a a b b a a",
            "max_tokens": 32,
            "temperature": 0.9,
            "top_k": 40,
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.1,
            "seed": 11,
        },
    ),
}


def random_request(rng: random.Random) -> Request:
    """Lengths and options at random; about one in ten asks for JSON of ``SCHEMA``."""
    text = " ".join(rng.choices(WORDS, k=rng.choice((1, 8, 40, 200))))
    body: dict[str, Any] = {
        "max_tokens": rng.choice((1, 2, 7, 30, 64, 96)),
        "temperature": rng.choice((0, 0.7, 1)),
    }
    if body["temperature"]:
        body["n"] = rng.choice((1, 1, 1, 2, 3))
    chat = rng.random() < 0.4
    if chat and rng.random() < 0.25:
        name = {"name": "person", "schema": SCHEMA}
        body |= {"response_format": {"type": "json_schema", "json_schema": name}, "max_tokens": 40}
        return Request(CHAT, {"messages": _chat(f"A person: {text}"), **body})
    if rng.random() < 0.2:
        body["stop"] = rng.sample([".", "\n", " the", "sea", "rain"], 2)
    if rng.random() < 0.2:
        body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    if rng.random() < 0.3:
        body["ignore_eos"] = True
    if rng.random() < 0.3:
        body |= {"top_p": rng.uniform(0.5, 1), "seed": rng.randrange(1000)}
    if rng.random() < 0.1:
        body |= {"presence_penalty": 0.5, "min_p": 0.05}
    if chat:
        return Request(CHAT, {"messages": _chat(text), **body})
    return Request(COMPLETIONS, {"prompt": text, **body})


def long_request(rng: random.Random) -> Request:
    """One whose client will not wait for its end."""
    text = " ".join(rng.choices(WORDS, k=rng.choice((4, 60))))
    body = {"max_tokens": 400, "ignore_eos": True}
    if rng.random() < 0.5:
        return Request(CHAT, {"messages": _chat(text), "n": rng.choice((1, 2)), **body})
    return Request(COMPLETIONS, {"prompt": text, **body})


def malformed(rng: random.Random, model: str) -> tuple[str, bytes]:
    """A path and a body that the server must refuse with a status from 400 to 499."""
    good = {"model": model, "prompt": "x", "max_tokens": 4}
    chat = {"model": model, "messages": _chat("x"), "max_tokens": 4}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    bodies: list[tuple[str, Any]] = [
        (COMPLETIONS, good | {"max_tokens": -1}),
        (COMPLETIONS, good | {"max_tokens": "many"}),
        (COMPLETIONS, good | {"temperature": -2}),
        (COMPLETIONS, good | {"top_p": 7}),
        (COMPLETIONS, good | {"n": 0}),
        (COMPLETIONS, good | {"n": 2, "temperature": 0}),
        (COMPLETIONS, good | {"logprobs": 10_000}),
        (COMPLETIONS, good | {"prompt": "far too long " * 1000}),
        (COMPLETIONS, good | {"prompt": {"not": "a prompt"}}),
        (COMPLETIONS, good | {"prompt": [1 << 40]}),
        (COMPLETIONS, good | {"model": "no-such-model"}),
        (COMPLETIONS, good | {"structured_outputs": {"regex": "(["}}),
        (CHAT, chat | {"messages": "hello"}),
        (CHAT, chat | {"messages": [{"role": "user"}], "stream": "perhaps"}),
        (CHAT, chat | {"response_format": schema}),
        (CHAT, {"model": model}),
        (CHAT, []),
        ("/v1/no/such/path", good),
    ]
    path, body = rng.choice(bodies)
    whole = json.dumps(body).encode()
    return rng.choice(
        ((path, whole), (path, whole), (path, whole), (path, whole[:-3]), (CHAT, b""))
    )
