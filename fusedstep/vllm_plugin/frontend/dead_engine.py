"""A dead engine is an error for everyone who waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from concurrent.futures import InvalidStateError
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.engine.core_client import BackgroundResources, MPClient, SyncMPClient


def tell_who_waits() -> None:
    """Let those who wait for an engine get an error when vLLM notes that it is dead.

    vLLM notes it in a flag, and refuses what is asked from then on. Whoever has asked before, for
    an answer or (``LLM``) for output, would wait for ever.
    """
    from vllm.v1.engine.core_client import BackgroundResources, MPClient

    if isinstance(vars(BackgroundResources)["engine_dead"], property):
        return
    stock = MPClient.__init__

    @wraps(stock)
    def init(self: MPClient, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        self.resources.client = weakref.ref(self)

    MPClient.__init__ = init
    BackgroundResources.engine_dead = property(_is_dead, _note)


def _is_dead(resources: BackgroundResources) -> bool:
    return bool(vars(resources)["engine_dead"])


def _note(resources: BackgroundResources, dead: bool) -> None:
    """In whatever thread has noticed. Requests for an answer that come later find the flag set."""
    vars(resources)["engine_dead"] = dead
    client = getattr(resources, "client", lambda: None)()
    if dead and client is not None:
        _tell(client)


def _tell(client: MPClient) -> None:
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    def fail(future: Any) -> None:
        with contextlib.suppress(InvalidStateError):  # the answer came after all
            if not future.done():
                future.set_exception(EngineDeadError())

    for future in list(client.utility_results.values()):
        if isinstance(future, asyncio.Future):
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits
                future.get_loop().call_soon_threadsafe(fail, future)
        else:
            fail(future)
    if isinstance(client, SyncMPClient):
        _end_output(client)


def _end_output(client: SyncMPClient) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    client.outputs_queue.put_nowait(EngineDeadError())
