"""Tokens from an engine to a client's events: vLLM's output processor, collector and parser."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from frontend.formats import REASONING, TOOLS
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.parser.harmony_utils import get_encoding
from vllm.outputs import RequestOutput
from vllm.parser.parser_manager import ParserManager
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from fusedstep.demo import demo_model
from fusedstep.vllm_plugin.frontend.collector import TokenCollector
from fusedstep.vllm_plugin.frontend.steps import Steps

# What the tokenizers of these models have as one token.
MARKS = re.compile(
    r"<[|\uff5c][^<>]*>|<[a-z_]+\|>|\uff5cDSML\uff5c|\]<\]minimax\[>\[|\[/?[A-Z_]+\]|<0x0A>|</?ifm\|\w+>"
    r"|</?(?:\w+:)?(?:think|response|answer|tool_calls?|tool_sep|arg_key|arg_value|function_calls?"
    r"|(?:start|end)_function_call|escape|longcat_tool_call|dots_function_call)>"
)
HARMONY = ("openai", "openai_gptoss")
NAMED = ("<tool_sep>", "<0x0A>", "<response>", "</response>", "<|python_tag|>", "<assistant>")
THINKING = {"thinking": True, "enable_thinking": True, "reasoning_effort": "high"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}


@functools.cache
def tokenizer() -> Any:
    """The bundled model's, with the marks of all formats: ordinary tokens, so none is left out."""
    plain = AutoTokenizer.from_pretrained(demo_model())
    found = {
        mark for text in (*TOOLS.values(), *REASONING.values()) for mark in MARKS.findall(text)
    }
    plain.add_tokens(sorted({*found, *NAMED}))
    return get_cached_tokenizer(plain)


def tokens(name: str) -> list[int]:
    """The text of a parser, "tool:..." or "reasoning:...", and an end-of-sequence token."""
    kind, _, parser = name.partition(":")
    text = (TOOLS if kind == "tool" else REASONING)[parser]
    if parser in HARMONY:
        ids: list[int] = get_encoding().encode(text, allowed_special="all")
        return ids
    return [*tokenizer().encode(text, add_special_tokens=False), tokenizer().eos_token_id]


def parser_cls(name: str) -> Any:
    kind, _, parser = name.partition(":")
    return ParserManager.get_parser(
        tool_parser_name=parser if kind == "tool" else None,
        reasoning_parser_name=parser if kind == "reasoning" else None,
        enable_auto_tools=kind == "tool",
        is_harmony=parser in HARMONY,
        tokenizer=tokenizer(),
    )


class Frontend:
    """One request's way through vLLM's frontend, with our unfolding or without."""

    def __init__(self, params: SamplingParams, *, ours: bool, prompt: Sequence[int] = (1,)) -> None:
        params.output_kind = RequestOutputKind.DELTA
        self.processor = OutputProcessor(tokenizer(), log_stats=False)
        self.steps = Steps(self.processor) if ours else None
        collector = TokenCollector if ours else RequestOutputCollector
        self.queue = collector(RequestOutputKind.DELTA, "r")
        request = EngineCoreRequest(
            "r", list(prompt), None, params, None, 0.0, None, None, None, external_req_id="r"
        )
        self.processor.add_request(request, None, queue=self.queue)

    def events(self, windows: Sequence[Sequence[int]]) -> list[RequestOutput]:
        """What a client of this request gets that reads whenever the engine has handed over."""
        found = []
        for index, window in enumerate(windows):
            reason = FinishReason.STOP if index == len(windows) - 1 else None
            output = EngineCoreOutput("r", list(window), finish_reason=reason)
            step: EngineCoreOutputs | None = EngineCoreOutputs(outputs=[output])
            step = self.steps.add(step) if self.steps else step
            while step is not None:
                self.processor.process_outputs(step.outputs, step.timestamp)
                step = self.steps.next() if self.steps else None
            while (event := self.queue.get_nowait()) is not None:
                found.append(event)
        return found


Parsed = tuple[list[dict[str, Any]], dict[str, Any]]


def parse(name: str, windows: Sequence[Sequence[int]], *, ours: bool) -> Parsed:
    """The parser's deltas, and what they make together."""
    cls = parser_cls(name)
    fields = {"model": "m", "messages": [{"role": "user", "content": "?"}], "stream": True}
    request = ChatCompletionRequest(**fields, tools=[copy.deepcopy(TOOL)], tool_choice="auto")
    parser = cls(tokenizer(), request.tools, chat_template_kwargs=THINKING)
    request = parser.adjust_request(request)
    params = SamplingParams(
        max_tokens=4096,
        skip_special_tokens=request.skip_special_tokens,
        detokenize=name.partition(":")[2] not in HARMONY,  # they have an encoding of their own
    )
    deltas = []
    for event in Frontend(params, ours=ours).events(windows):
        (output,) = event.outputs
        delta = parser.parse_delta(
            output.text,
            list(output.token_ids),
            request,
            prompt_token_ids=event.prompt_token_ids,
            finished=output.finish_reason is not None,
        )
        if delta is not None:
            deltas.append(delta.model_dump(exclude_unset=True))
    return _without_ids(deltas), together(deltas)


@functools.cache
def one_by_one(name: str) -> Parsed:
    """What stock vLLM gives: one token per output."""
    return parse(name, [[token] for token in tokens(name)], ours=False)


def together(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Content, reasoning, and name and arguments of every call."""
    whole: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}}
    for delta in deltas:
        for kind in ("content", "reasoning"):
            whole[kind] += delta.get(kind) or ""
        for call in delta.get("tool_calls") or ():
            known = whole["calls"].setdefault(call["index"], ["", ""])
            function = call.get("function") or {}
            known[0] += function.get("name") or ""
            known[1] += function.get("arguments") or ""
    return whole


def _without_ids(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A call's id is random."""
    for delta in deltas:
        for call in delta.get("tool_calls") or ():
            call.pop("id", None)
    return deltas
