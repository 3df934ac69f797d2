"""A child process with an engine on the stand-in GPU; ``engine_child``: what it can be asked."""

from __future__ import annotations

import gc
import os
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import engine_child
from engine_child import EngineChild

DEFAULTS: dict[str, Any] = {
    "cudagraph_mode": "FULL_AND_PIECEWISE",
    "capture_sizes": (1, 3, 32),  # of three rows: one is padding for two
    "max_logits_bytes": 256 << 20,  # of rounds that are recorded; 0: none is
    "ops": "native",  # which step operations are launched; "triton" is interpreted
}


class StandInChild(EngineChild):
    """One process, one engine at a time."""

    def __init__(self, model: str, settings: dict[str, Any], **options: Any) -> None:
        """``settings``: other values for DEFAULTS; ``options`` go to LLM."""
        self.arguments = model, settings, options
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), start, self.arguments)

    def become(self, settings: dict[str, Any], model: str | None = None, **options: Any) -> None:
        """An engine with these, unless it is that already; of the same model if of no other."""
        arguments = model or self.arguments[0], settings, options
        if arguments != self.arguments:
            self.arguments = arguments
            self.call(build, *arguments)


def start(model: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Child: vLLM gets the stand-in's platform and worker."""
    os.environ |= {
        "FUSEDSTEP": "on",
        "OMP_NUM_THREADS": "1",  # the operations are tiny
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_BREAKABLE_CUDAGRAPH": "1",  # piecewise graphs without a compiled model
    }
    from fusedstep.options import Options
    from fusedstep.vllm_plugin import compat, register
    from fusedstep.vllm_plugin.launch import wiring

    Options.check = lambda *_, **__: None  # type: ignore[method-assign]
    wiring.switch_on(Options.parse({}))
    platform = register.platform

    def stand_in() -> str:
        platform()  # Triton's stand-in
        return "standin.engine_platform.StandInPlatform"

    register.platform = stand_in
    compat.WORKER_CLS = "standin.engine.StandInWorker"
    build(model, settings, options)


def build(model: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Child: an engine, in the place of the one before."""
    from standin.engine_platform import SETTINGS

    from fusedstep import LLM
    from fusedstep.vllm_plugin.runner import recorded_rounds

    if engine_child.ENGINE is not None:
        from vllm.distributed import parallel_state

        engine_child.ENGINE.engine_core.shutdown()
        engine_child.ENGINE = None
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        gc.collect()
    SETTINGS.clear()
    SETTINGS.update(DEFAULTS | settings)
    recorded_rounds.MAX_LOGITS_BYTES = SETTINGS["max_logits_bytes"]
    engine_child.ENGINE = LLM(model, **{"dtype": "float32"} | options).llm_engine


def use_loop(loop: str) -> dict[str, Any]:
    stats: dict[str, Any] = engine_child.ENGINE.collective_rpc("use_loop", args=(loop,))[0]
    return stats


def use_timing(seed: int | None) -> None:
    """Work is done at random times; None: as late as possible."""
    from standin.device import GPU

    GPU.random = None if seed is None else random.Random(seed)


def num_replays() -> dict[str, int]:
    """Graphs that were replayed: vLLM's full ones, pieces of its piecewise ones (graphs between
    calls in Python), those of windows, and of the draft model alone."""
    runner = engine_child.runner()
    manager = runner.cudagraph_manager
    drafter = getattr(runner.rounds, "drafter", None)
    ours = runner.graph_store.graphs
    pieces = getattr(manager, "breakable_cg_runner", None)
    captures = [] if pieces is None else [entry.capture for entry in pieces.entries.values()]
    parts = [getattr(part, "__self__", None) for capture in captures for part in capture.segments]
    windows = [] if ours is None else [*ours._single.values(), *ours._many.values()]
    return {
        "full": sum(graph.replays for graph in manager.graphs.values()),
        "pieces": sum(graph.replays for graph in parts if graph is not None),
        "windows": sum(graph.replays for graph in windows),
        "drafts": sum(graph.replays for graph in getattr(drafter, "graphs", {}).values()),
    }


def device_state() -> dict[str, Any]:
    """What the stand-in has counted, in bytes where it is memory."""
    from standin.device import GPU

    gc.collect()
    GPU.synchronize()
    runner = engine_child.runner()
    worker = engine_child.ENGINE.engine_core.engine_core.model_executor.driver_worker.worker
    # Logprobs: as many as a window has asked for.
    logprobs = [slot.output.logprobs for slot in runner.windows.slots]
    seen = [t for taken in logprobs for t in (taken.token_ids, taken.logprobs, taken.ranks)]
    seen += [*runner.kv_caches, runner.cudagraph_manager.hidden_states]
    live = sum(n for owner, n in GPU.live.items() if not isinstance(owner, tuple))
    return {
        "waits": dict(GPU.waits),
        "unfinished": len(GPU.unfinished),
        "estimated": worker.graph_bytes,  # of graphs, before the KV cache takes the rest
        "captured": getattr(worker, "captured_bytes", 0),
        "unseen": live - worker.profiled - runner.stock_bytes - memory_of(seen),
    }


def memory_of(tensors: list[Any]) -> int:
    """Bytes, of what shares memory once."""
    parts = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t is not None}
    return sum(part.nbytes() for part in parts.values())
