"""Whoever waits for an engine hears of its death, however vLLM learns of it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import core_client
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources, MPClient, SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from fusedstep.vllm_plugin.frontend import dead_engine


def init(self: Any) -> None:
    """vLLM's, without an engine to start."""
    self.resources = BackgroundResources(ctx=None)
    self.utility_results = {}
    self.core_engine = b""
    self.encoder = SimpleNamespace(encode=lambda _: [b""])
    self.input_socket = SimpleNamespace(send_multipart=lambda *_, **__: None)


@pytest.fixture
def unpatched() -> Iterator[None]:
    """As vLLM ships it, whether or not its plug-ins are loaded in this process."""
    was = vars(BackgroundResources)["engine_dead"], MPClient.__init__
    BackgroundResources.engine_dead = False
    MPClient.__init__ = init
    yield
    BackgroundResources.engine_dead, MPClient.__init__ = was


def client(cls: Any) -> Any:
    """One whose engine answers nothing."""
    made = object.__new__(cls)
    MPClient.__init__(made)
    made.outputs_queue = queue.Queue()
    return made


def dies(resources: BackgroundResources) -> None:
    """The engine says so itself, before it ends."""
    frame = SimpleNamespace(buffer=core_client.EngineCoreProc.ENGINE_CORE_DEAD)
    with pytest.raises(EngineDeadError):
        resources.validate_alive([frame])


def is_killed(resources: BackgroundResources) -> None:
    """vLLM's monitor sees that its process is gone."""
    resources.engine_dead = True


ENDS = (dies, is_killed)


def asks(made: Any, end: Callable[[Any], None]) -> list[Exception]:
    """The errors of two threads that wait for an answer and for output while the engine ends."""
    errors: list[Exception] = []

    def ask(method: Callable[[], object]) -> None:
        try:
            method()
        except Exception as error:
            errors.append(error)

    methods = (lambda: made.call_utility("get_supported_tasks"), made.get_output)
    threads = [threading.Thread(target=ask, args=(m,), daemon=True) for m in methods]
    for thread in threads:
        thread.start()
    while not made.utility_results:
        pass
    end(made.resources)
    for thread in threads:
        thread.join(1)
    return errors


@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_waits(unpatched: None, end: Callable[[Any], None]) -> None:
    assert asks(client(SyncMPClient), end) == []  # they would wait for ever
    dead_engine.tell_who_waits()
    dead_engine.tell_who_waits()
    errors = asks(client(SyncMPClient), end)
    assert [type(error) for error in errors] == [EngineDeadError] * 2


@pytest.mark.parametrize("end", ENDS)
def test_a_server_that_waits(unpatched: None, end: Callable[[Any], None]) -> None:
    dead_engine.tell_who_waits()

    async def ask() -> None:
        made = client(AsyncMPClient)
        future = asyncio.get_running_loop().create_future()
        answered: Future[int] = Future()
        answered.set_result(1)
        made.utility_results = {1: future, 2: answered}
        await asyncio.to_thread(end, made.resources)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(future, 1)

    asyncio.run(ask())
