"""Arrivals end a window: a counter that the engine raises while the worker runs its steps."""

from __future__ import annotations

import mmap
import os

import numpy as np

from fusedstep.window.page import shared_file

# A window that carries this as the number of arrivals seen is never cut short.
NEVER_END = 1 << 62
# With this it ends after its first step.
END_AFTER_ONE_STEP = -1


class ArrivalCounter:
    """Requests that reached the engine since it started, in memory that its processes share.

    The engine's input thread writes it; workers compare it, after every step, with the number
    that the window's scheduler had seen. One writer, one aligned 8-byte word: no lock.
    """

    def __init__(self, name: str | None) -> None:
        """Without a name this process has it for itself."""
        self.path = None if name is None else shared_file(name)
        if self.path is None:  # a page of its own, too
            words = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=np.int64, count=2)
        else:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
                file.truncate(16)
                words = np.memmap(file, dtype=np.int64, mode="r+", shape=(2,))
        self._count, self._cannot_end = words[:1], words[1:]

    @property
    def count(self) -> int:
        return int(self._count[0])

    @property
    def address(self) -> int:
        """Address of the count in this process: the start of a page."""
        return int(self._count.ctypes.data)

    @property
    def can_end_windows(self) -> bool:
        """Can the form of the loop that runs be ended? Its workers write it; until then it can."""
        return not self._cannot_end[0]

    @can_end_windows.setter
    def can_end_windows(self, can_be_ended: bool) -> None:
        self._cannot_end[0] = not can_be_ended

    def add(self, n: int = 1) -> None:
        self._count[0] += n

    def exceeds(self, seen: int) -> bool:
        """Has a request arrived that the scheduler of this window had not seen?"""
        return int(self._count[0]) > seen

    def unlink(self) -> None:
        """Everybody has it mapped: its name is needed no more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
