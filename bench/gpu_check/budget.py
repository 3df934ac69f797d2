"""How much of ``gpu_check``'s time is left, and what fits into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds that a part of a kind is expected to take before one has been seen.
GUESS = {
    "device": 15.0,
    "start as served": 150.0,
    "start": 90.0,
    "facts": 2.0,
    "form": 15.0,
    "equality": 10.0,
    "point": 6.0,
    "trace": 8.0,
    "loop": 45.0,
}
# A part that takes longer hangs: what it waits for is ended, and the rest goes on without it.
LIMITS = {
    "device": 60.0,
    "start as served": 300.0,
    "start": 180.0,
    "facts": 60.0,
    "form": 180.0,
    "equality": 120.0,
    "point": 90.0,
    "trace": 90.0,
    "loop": 120.0,
}


class Budget:
    """The time that is left, and what a part of each kind has taken so far."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = self._share = clock() + 60 * minutes
        self._expected = dict(GUESS)

    def divide(self, parts: int) -> None:
        """The next part may take the first of ``parts`` equal shares of the time that is left."""
        self._share = self._clock() + (self._end - self._clock()) / parts

    def limit(self, kind: str) -> float:
        """Seconds that a part of this kind may take: no more than are left of the whole."""
        return max(min(LIMITS[kind], self._end - self._clock()), 0.01)

    def fits(self, kind: str) -> bool:
        """Is there time in this share for one more part of this kind?"""
        return self._clock() + self._expected[kind] <= self._share

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """From the first on, the longest part of a kind is what the next is expected to take."""
        began = self._clock()
        yield
        took = self._clock() - began
        seen = self._expected[kind]
        self._expected[kind] = took if seen == GUESS[kind] else max(took, seen)
