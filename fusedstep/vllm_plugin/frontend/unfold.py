"""Hooks of unfolding: between vLLM's client of the engine and its output processor.

All of it is in classes that every frontend has: the API server's process, each of several, and an
``LLM``'s. An engine whose scheduler is not ours, and one that hands over several tokens of its own
(speculative decoding, diffusion), is left alone.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fusedstep.vllm_plugin import compat
from fusedstep.vllm_plugin.frontend.collector import TokenCollector
from fusedstep.vllm_plugin.frontend.steps import Steps, count_unwatched

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput
    from vllm.v1.metrics.stats import IterationStats

# Outputs that are handed on before others have a turn at the event loop: vLLM's own default.
CHUNK = 128


def unfold_windows() -> None:
    """Let vLLM's frontend in this process see one token per output of a fusedstep engine."""
    from vllm.v1.engine import async_llm, core_client, llm_engine
    from vllm.v1.engine.output_processor import OutputProcessor

    if getattr(OutputProcessor.process_outputs, "unfolds", False):
        return
    async_llm.RequestOutputCollector = TokenCollector
    _give_steps(async_llm.AsyncLLM)
    _give_steps(llm_engine.LLMEngine)
    _take_steps(core_client.InprocClient)
    _take_steps(core_client.SyncMPClient)
    _take_steps_async(core_client.AsyncMPClient)
    _count_unwatched(OutputProcessor)


def _give_steps(engine_cls: type[AsyncLLM] | type[LLMEngine]) -> None:
    """An engine's client of the engine core gets its ``Steps``."""
    stock = engine_cls.__init__

    def __init__(self: AsyncLLM | LLMEngine, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if compat.hands_over_windows(self.vllm_config):
            self.engine_core.steps = Steps(self.output_processor)

    engine_cls.__init__ = __init__


def _take_steps(client_cls: Any) -> None:
    stock = client_cls.get_output

    def get_output(self: Any) -> EngineCoreOutputs:
        steps: Steps | None = getattr(self, "steps", None)
        if steps is None:
            return stock(self)
        later = steps.next()
        return steps.add(stock(self)) if later is None else later

    client_cls.get_output = get_output


def _take_steps_async(client_cls: Any) -> None:
    stock = client_cls.get_output_async
    taken = 0  # outputs since the event loop had its turn

    async def get_output_async(self: Any) -> EngineCoreOutputs:
        nonlocal taken
        steps: Steps | None = getattr(self, "steps", None)
        if steps is None:
            return await stock(self)
        if taken >= CHUNK:
            taken = 0
            await asyncio.sleep(0)
        outputs = steps.next()
        if outputs is None:
            outputs, taken = steps.add(await stock(self)), 0
        taken += len(outputs.outputs)
        return outputs

    client_cls.get_output_async = get_output_async


def _count_unwatched(processor_cls: type[OutputProcessor]) -> None:
    stock = processor_cls.process_outputs

    def process_outputs(
        self: OutputProcessor,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: IterationStats | None = None,
        weight_version: str | None = None,
    ) -> OutputProcessorOutput:
        count_unwatched(engine_core_outputs, iteration_stats)
        return stock(
            self, engine_core_outputs, engine_core_timestamp, iteration_stats, weight_version
        )

    process_outputs.unfolds = True  # type: ignore[attr-defined]
    processor_cls.process_outputs = process_outputs
