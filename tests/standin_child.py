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
    "capture_sizes": (1, 2, 4),
    "ops": "native",  # which step operations are launched; "triton" is interpreted
}


class StandInChild(EngineChild):
    """One process, one engine at a time."""

    def __init__(self, model: str, settings: dict[str, Any], **options: Any) -> None:
        """``settings``: other values for DEFAULTS; ``options`` go to LLM."""
        self.arguments = model, settings, options
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), start, self.arguments)

    def become(self, settings: dict[str, Any], **options: Any) -> None:
        """An engine with these, unless it is that already."""
        arguments = self.arguments[0], settings, options
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

    if engine_child.ENGINE is not None:
        from vllm.distributed import parallel_state

        engine_child.ENGINE.engine_core.shutdown()
        engine_child.ENGINE = None
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        gc.collect()
    SETTINGS.clear()
    SETTINGS.update(DEFAULTS | settings)
    engine_child.ENGINE = LLM(model, dtype="float32", **options).llm_engine


def use_loop(loop: str) -> dict[str, Any]:
    stats: dict[str, Any] = engine_child.ENGINE.collective_rpc("use_loop", args=(loop,))[0]
    return stats


def use_timing(seed: int | None) -> None:
    """Work is done at random times; None: as late as possible."""
    from standin.device import GPU

    GPU.random = None if seed is None else random.Random(seed)


def device_state() -> dict[str, Any]:
    """What the stand-in has counted, in bytes where it is memory."""
    from standin.device import GPU

    runner = engine_child.runner()
    worker = engine_child.ENGINE.engine_core.engine_core.model_executor.driver_worker.worker
    caches = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in runner.kv_caches}
    cache, captured = sum(c.nbytes() for c in caches.values()), getattr(worker, "captured_bytes", 0)
    return {
        "waits": dict(GPU.waits),
        "unfinished": len(GPU.unfinished),
        "estimated": worker.graph_bytes,  # of graphs, before the KV cache takes the rest
        "captured": captured,
        "unseen": GPU.live_bytes() - worker.profiled - cache - captured,
    }
