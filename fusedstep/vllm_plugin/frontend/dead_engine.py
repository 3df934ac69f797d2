"""A killed engine is an error for a program that waits for it synchronously."""

from __future__ import annotations

from functools import wraps
from typing import Any


def tell_who_waits() -> None:
    """Let a synchronous client's ``get_output`` raise when its engine has been killed.

    vLLM notices and ends the thread that reads the engine's output, which says nothing: ``LLM``
    would wait for ever.
    """
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    stock = SyncMPClient.shutdown
    if getattr(stock, "tells", False):
        return

    @wraps(stock)
    def shutdown(self: SyncMPClient, *args: Any, **kwargs: Any) -> None:
        if self.resources.engine_dead:
            self.outputs_queue.put_nowait(EngineDeadError())
        stock(self, *args, **kwargs)

    shutdown.tells = True  # type: ignore[attr-defined]
    SyncMPClient.shutdown = shutdown
