"""Arrivals end a window: a counter that the engine raises while the worker runs its steps."""

from __future__ import annotations

import os

import numpy as np

from fusedstep.window.page import shared_file

# A window that carries this as the number of arrivals seen is never cut short.
ALL = 1 << 62
# With this it ends after its first step.
NONE = -1


class ArrivalCounter:
    """Requests that reached the engine since it started, in memory that its processes share.

    The engine's input thread writes it; workers compare it, after every step, with the number
    that the window's scheduler had seen. One writer, one aligned 8-byte word: no lock.
    """

    def __init__(self, name: str | None) -> None:
        """Without a name this process has it for itself."""
        self.path = None if name is None else shared_file(name)
        if self.path is None:
            self._count = np.zeros(1, dtype=np.int64)
            return
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            file.truncate(8)
            self._count = np.memmap(file, dtype=np.int64, mode="r+", shape=(1,))

    @property
    def count(self) -> int:
        return int(self._count[0])

    @property
    def address(self) -> int:
        """Where this process has the count: the start of a page."""
        return int(self._count.ctypes.data)

    def add(self, n: int = 1) -> None:
        self._count[0] += n

    def exceeds(self, seen: int) -> bool:
        """Has a request arrived that the scheduler of this window had not seen?"""
        return int(self._count[0]) > seen

    def unlink(self) -> None:
        """Everybody has it mapped: its name is needed no more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
