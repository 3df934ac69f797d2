"""Requests that reach the engine while a window runs: counted at the door, seen by the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusedstep.window import arrivals

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest


def arrival_counter(vllm_config: VllmConfig) -> arrivals.ArrivalCounter:
    """The one of this engine: its scheduler and its workers open the same."""
    rank = vllm_config.parallel_config.data_parallel_index
    return arrivals.ArrivalCounter(f"{vllm_config.instance_id}-{rank}")


def announce_arrivals() -> None:
    """Count a request when it reaches the engine core's input thread.

    The main thread is blocked on the oldest window then and would learn of it too late.
    """
    from vllm.v1.engine.core import EngineCore

    stock = EngineCore.preprocess_add_request
    if getattr(stock, "announces", False):
        return

    def preprocess_add_request(self: Any, request: EngineCoreRequest) -> Any:
        counter = getattr(self.scheduler, "arrivals", None)
        if counter is None:
            return stock(self, request)
        counter.add()
        try:
            return stock(self, request)
        except BaseException:
            counter.add(-1)  # it will never be added
            raise

    preprocess_add_request.announces = True  # type: ignore[attr-defined]
    EngineCore.preprocess_add_request = preprocess_add_request
