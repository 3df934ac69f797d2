"""Window counters: the scheduler (engine core) writes them to shared memory, the API server reads
them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fusedstep.counts import WindowCounts
from fusedstep.window.page import Page

WRITE_EVERY = 0.25  # seconds


class PublishedCounts(WindowCounts):
    """The scheduler's counts, and the page that they are published on."""

    def __init__(self, page: Page | None = None) -> None:
        super().__init__()
        self.page = page
        self._written = 0.0

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Measures the scheduler's time."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self.host_seconds += time.perf_counter() - since

    def add_turn(
        self, reason: str, reserved: int, steps: int, num_tokens: int, num_rows: int = 0
    ) -> None:
        """A batch gave its requests so many tokens in ``steps`` of up to ``reserved`` steps.

        ``reason``: why no more steps. A batch that gave none, as chunks of prompts do, is no turn.
        ``num_rows``: of those that got any token.
        """
        if steps == 0:
            return
        self.tokens += num_tokens
        if reserved == 1:
            self.one_step_turns[reason] += 1
        else:
            self.add_window(reason, reserved, steps)
            self.idle_row_steps += max(num_rows * steps - num_tokens, 0)  # a round gives several

    def publish(self, *, now: bool = False) -> None:
        """Write the page, a few times a second."""
        if self.page is not None and (now or time.monotonic() - self._written > WRITE_EVERY):
            self._written = time.monotonic()
            self.page.write(self.as_dict())
