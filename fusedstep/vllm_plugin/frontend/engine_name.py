"""The name of an engine's shared memory, told by the engine to each server that it has."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING

from fusedstep.vllm_plugin.shared import engine_is_here

if TYPE_CHECKING:
    from vllm.v1.engine.core_client import MPClient


def ask_the_engine() -> None:
    """Let a server look for its engine's counts where the engine writes them.

    Each of several API servers makes a configuration of its own, and vLLM gives each another
    ``instance_id``. The engine's is in what it answers when it is ready.
    """
    import msgspec
    from vllm.v1.engine import EngineCoreReadyResponse
    from vllm.v1.engine.core_client import MPClient

    stock = MPClient._apply_ready_response
    if getattr(stock, "asks_the_engine", False):
        return

    @wraps(stock)
    def _apply_ready_response(self: MPClient, payload: bytes) -> None:
        stock(self, payload)
        if not payload:
            return
        ready: EngineCoreReadyResponse = msgspec.msgpack.decode(
            payload, type=EngineCoreReadyResponse
        )
        if engine_is_here(self.vllm_config, ready.data_parallel_rank):
            self.vllm_config.instance_id = ready.instance_id

    _apply_ready_response.asks_the_engine = True  # type: ignore[attr-defined]
    MPClient._apply_ready_response = _apply_ready_response
