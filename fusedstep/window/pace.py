"""How far the host runs ahead of the device, and when it learns that a window is over."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch

from fusedstep.ops.types import WindowRows
from fusedstep.window.pinned import host_zeros


class Pace(Protocol):
    """Asked before every step."""

    def begin(self) -> None:
        """A window starts."""

    def goes_on(self, rows: WindowRows) -> bool:
        """May another step be enqueued? False once no row is known to be active."""


class HostPace:
    """The device is the host: a step is over when its call returns."""

    def begin(self) -> None:
        pass

    def goes_on(self, rows: WindowRows) -> bool:
        return bool(rows.num_active > 0)


class SetPace:
    """All steps of a window are run, whether or not a row is still active: others count on them."""

    def begin(self) -> None:
        pass

    def goes_on(self, rows: WindowRows) -> bool:
        return True


class AheadPace:
    """The host enqueues at most ``ahead`` steps that the device has not finished.

    ``num_active`` follows each step into pinned memory, an event behind it; nothing else is ever
    waited for. So a window runs up to ``ahead`` steps after its last row has stopped.
    """

    def __init__(self, ahead: int = 2) -> None:
        self.ahead = ahead
        pinned = torch.cuda.is_available()
        self._counts = host_zeros(ahead + 1, 1, dtype=torch.int32, pinned=pinned)
        self._counts_np = self._counts.numpy()
        # Waiting sleeps; that it wakes up late is hidden by the steps that are still enqueued.
        self._events = [torch.cuda.Event(blocking=True) for _ in range(ahead + 1)]  # type: ignore[no-untyped-call]
        self._in_flight: deque[int] = deque()
        self._next = 0

    def begin(self) -> None:
        self._in_flight.clear()

    def goes_on(self, rows: WindowRows) -> bool:
        index, self._next = self._next, (self._next + 1) % (self.ahead + 1)
        self._counts[index].copy_(rows.num_active, non_blocking=True)
        self._events[index].record()
        self._in_flight.append(index)
        if len(self._in_flight) <= self.ahead:
            return True
        oldest = self._in_flight.popleft()
        self._events[oldest].synchronize()
        return bool(self._counts_np[oldest, 0] > 0)
