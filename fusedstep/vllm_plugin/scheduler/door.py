"""Requests and aborts that reach the engine while a window runs: announced to the worker."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from fusedstep.vllm_plugin.scheduler.tracing import Tracing
from fusedstep.window import arrivals

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore


class Door:
    """The way of requests and aborts into the engine core; ends windows for them.

    The engine core's input thread announces them while its main thread, which is the scheduler's,
    waits for the oldest window. A window ends when the counter exceeds what it was when the window
    was scheduled.
    """

    def __init__(self, counter: arrivals.ArrivalCounter, tracing: Tracing | None = None) -> None:
        self.counter = counter
        self.tracing = tracing or Tracing()
        self._is_set_up = False
        self.is_open = True  # a request that comes now can be admitted (the scheduler says)
        # Announced, not yet with the scheduler. An id may come again before its abort has.
        self.arriving: Counter[str] = Counter()
        self.leaving: set[str] = set()
        self._lock = threading.Lock()

    def sets_up(self) -> bool:
        """True the first time: the engine core is complete."""
        first, self._is_set_up = not self._is_set_up, True
        return first

    @property
    def outside(self) -> set[str]:
        """Ids of requests and aborts on their way."""
        with self._lock:
            return {*self.arriving, *self.leaving}

    def announce_request(self, request_id: str) -> None:
        """Input thread: a request is on its way. Windows end if it could be admitted.

        In this order: the scheduler sets ``is_open`` before it looks at ``outside``.
        """
        with self._lock:
            self.arriving[request_id] += 1
        if is_open := self.is_open:
            self.end_windows()
        self.tracing.announced("arrival", [request_id], ends_windows=is_open)

    def announce_abort(self, request_ids: Iterable[str]) -> None:
        """Input thread: aborts that windows end for are on their way to the scheduler."""
        with self._lock:
            self.leaving.update(request_ids)
        self.end_windows()
        self.tracing.announced("abort", list(request_ids), ends_windows=True)

    def received(self, request_id: str) -> None:
        """The scheduler has the request."""
        with self._lock:
            self.arriving[request_id] -= 1
            if self.arriving[request_id] <= 0:
                del self.arriving[request_id]

    def aborts_received(self, request_ids: Iterable[str]) -> None:
        """The scheduler has the aborts."""
        with self._lock:
            self.leaving.difference_update(request_ids)

    def end_windows(self) -> None:
        """End the windows that are scheduled, each after the step in flight."""
        with self._lock:
            self.counter.add()

    def seen(self, count: int) -> int:
        """The arrival count to stamp on a window: ``count``, or END_AFTER_ONE_STEP if an announced
        request is still outside."""
        with self._lock:
            outside = self.arriving or self.leaving
            return arrivals.END_AFTER_ONE_STEP if self.is_open and outside else count


def announce_arrivals() -> None:
    """Let the engine core's input thread announce requests and aborts at the scheduler's door.

    The scheduler also gets to know whether its workers run windows.
    """
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc

    stock_init, stock = EngineCore.__init__, EngineCore.preprocess_add_request
    if getattr(stock, "announces", False):
        return

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        open_door(self)

    def preprocess_add_request(self: Any, request: EngineCoreRequest) -> Any:
        preprocessed = stock(self, request)
        door = getattr(self.scheduler, "door", None)
        if door is not None:
            forget_aborts(self.aborts_queue, request.request_id)
            door.announce_request(request.request_id)
        return preprocessed

    preprocess_add_request.announces = True  # type: ignore[attr-defined]
    EngineCore.__init__ = __init__
    EngineCore.preprocess_add_request = preprocess_add_request
    # In a process of its own the engine core loads plug-ins within its own __init__.
    EngineCoreProc.run_busy_loop = _opens_door(EngineCoreProc.run_busy_loop)
    DPEngineCoreProc.run_busy_loop = _opens_door(DPEngineCoreProc.run_busy_loop)
    if reject := getattr(EngineCoreProc, "_reject_add_while_paused", None):  # since vLLM 0.33
        EngineCoreProc._reject_add_while_paused = _shuts_the_door(reject)


def _shuts_the_door(stock: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """A request that is rejected never gets to the scheduler: it is on its way no more."""

    def _reject_add_while_paused(self: Any, request: Any) -> bool:
        rejected = stock(self, request)
        door = getattr(self.scheduler, "door", None)
        if rejected and door is not None and not request.abort_immediately:
            door.received(request.request_id)
        return rejected

    return _reject_add_while_paused


def _opens_door(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    def run_busy_loop(self: Any) -> None:
        open_door(self)
        stock(self)

    return run_busy_loop


def open_door(core: EngineCore) -> None:
    """Once, when the engine core is complete: aborts are announced, and the workers are asked."""
    scheduler: Any = core.scheduler
    if not hasattr(scheduler, "door") or not scheduler.door.sets_up():
        return
    stock_put = core.aborts_queue.put_nowait

    def put_nowait(request_ids: Any) -> None:
        stock_put(request_ids)
        scheduler.announce_abort(request_ids)

    core.aborts_queue.put_nowait = put_nowait
    scheduler.ask_workers(core.model_executor)


def forget_aborts(aborts: queue.Queue[list[str]], request_id: str) -> None:
    """Input thread: a request comes with an id that was aborted before.

    vLLM handles an abort twice: from this queue as soon as it can, and in its place among the
    requests. If the first came late, it would abort the new request.
    """
    with aborts.mutex:
        for n, ids in enumerate(aborts.queue):
            if request_id in ids:  # the list is also the one that comes in its place
                aborts.queue[n] = [other for other in ids if other != request_id]
