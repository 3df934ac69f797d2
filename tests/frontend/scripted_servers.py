"""Servers of the scripted model, and how to ask them."""

from __future__ import annotations

from typing import Any

import openai
from frontend import scripted
from frontend.stream import TOOL
from serving import Server

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


def complete(server: Server, **fields: Any) -> Any:
    """What comes after the prompt before WORDS."""
    with client(server) as one:
        prompt = scripted.prompt(WORDS_AT)
        fields = {"temperature": 0} | fields
        answer: Any = one.completions.create(model="m", prompt=prompt, **fields)
        return list(answer) if fields.get("stream") else answer
