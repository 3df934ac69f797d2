"""What an engine's windows were: counted by its scheduler, read by its server."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusedstep.window.page import Page

if TYPE_CHECKING:
    pass

WRITE_EVERY = 0.25  # seconds
# Upper bounds of the histogram of steps per window.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class WindowCounts:
    """Since the engine started. A window is a turn that reserved more than one step."""

    page: Page | None = None
    windows: int = 0
    steps: int = 0  # of windows, that gave tokens
    unused_steps: int = 0  # reserved for a window that ended before them
    early_exits: int = 0  # windows with unused steps
    tokens: int = 0  # of all turns
    single_steps: Counter[str] = field(default_factory=Counter)  # turns of one step, by reason
    limits: Counter[str] = field(default_factory=Counter)  # windows, by what bound their length
    lengths: Counter[int] = field(default_factory=Counter)  # windows, by steps that gave tokens
    host_seconds: float = 0.0  # in the scheduler, of all turns
    _written: float = 0.0

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """The scheduler's time."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self.host_seconds += time.perf_counter() - since

    def came_back(self, reason: str, reserved: int, num_tokens: list[int]) -> None:
        """A batch gave each of its requests so many tokens in up to ``reserved`` steps.

        ``reason``: why no more steps. A batch that gave none, as chunks of prompts do, is no turn.
        """
        steps = max(num_tokens, default=0)
        if steps == 0:
            return
        self.tokens += sum(num_tokens)
        if reserved == 1:
            self.single_steps[reason] += 1
        else:
            self.windows += 1
            self.steps += steps
            self.unused_steps += reserved - steps
            self.early_exits += steps < reserved
            self.limits[reason] += 1
            self.lengths[steps] += 1

    def publish(self, *, now: bool = False) -> None:
        """For the server, a few times a second."""
        if self.page is not None and (now or time.monotonic() - self._written > WRITE_EVERY):
            self._written = time.monotonic()
            self.page.write(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        lengths = {
            str(bound): sum(n for length, n in self.lengths.items() if length <= bound)
            for bound in BUCKETS
        }
        return {
            "windows": self.windows,
            "steps": self.steps,
            "unused_steps": self.unused_steps,
            "early_exits": self.early_exits,
            "tokens": self.tokens,
            "host_seconds": self.host_seconds,
            "single_steps": dict(self.single_steps),
            "limits": dict(self.limits),
            "lengths": lengths,  # upper bound -> windows of at most so many steps
        }
