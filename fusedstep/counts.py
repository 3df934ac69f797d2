"""Counts of windows: the names that the worker, the scheduler, the metrics and ``explain`` share.

A *window* is a turn of the scheduler that reserved more than one decode step, a *one-step turn* one
that did not (K = 1). A *stock step* is vLLM's own step in the worker.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

# Upper bounds of the histogram of steps per window.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class WindowCounts:
    """Since an engine started, or over ``seconds``."""

    seconds: float | None = None
    windows: int = 0
    steps: int = 0  # of windows, that gave tokens
    unused_steps: int = 0  # reserved for a window that ended before them
    idle_row_steps: int = 0  # steps of windows that rows sat out, having stopped before
    early_exits: int = 0  # windows with unused steps
    tokens: int = 0  # of all turns
    drafts: int = 0  # speculative tokens that were verified, of all turns
    accepted_drafts: int = 0  # that held
    refused_tokens: int = 0  # that the device gave, and the host's grammar refused: 0, or a fault
    host_seconds: float = 0.0  # in the scheduler, of all turns
    one_step_turns: Counter[str] = field(default_factory=Counter)  # by reason
    limits: Counter[str] = field(default_factory=Counter)  # windows, by what bound their length
    # Upper bound -> windows of at most so many steps that gave tokens.
    lengths: Counter[int] = field(default_factory=lambda: Counter(dict.fromkeys(BUCKETS, 0)))

    @property
    def steps_per_window(self) -> float:
        return self.steps / max(self.windows, 1)

    @property
    def host_ms_per_token(self) -> float:
        return 1e3 * self.host_seconds / max(self.tokens, 1)

    def add_window(self, limit: str, reserved: int, steps: int) -> None:
        """A window of ``reserved`` steps of which ``steps`` gave tokens."""
        self.windows += 1
        self.steps += steps
        self.unused_steps += reserved - steps
        self.early_exits += steps < reserved
        self.limits[limit] += 1
        self.lengths.update(bound for bound in BUCKETS if steps <= bound)

    def __add__(self, other: WindowCounts) -> WindowCounts:
        """Those of two engines."""
        total = WindowCounts()
        for name in (f.name for f in fields(WindowCounts) if f.name != "seconds"):
            if isinstance(value := getattr(total, name), Counter):  # + would drop what is 0
                value.update(getattr(self, name))
                value.update(getattr(other, name))
            else:
                setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def since(self, before: WindowCounts, seconds: float | None = None) -> WindowCounts:
        """The counts of the time after ``before``."""
        new = WindowCounts(seconds=seconds)
        for name in (f.name for f in fields(WindowCounts) if f.name != "seconds"):
            now, then = getattr(self, name), getattr(before, name)
            if isinstance(now, Counter):
                setattr(new, name, Counter({key: n - then[key] for key, n in now.items()}))
            else:
                setattr(new, name, now - then)
        return new

    def as_dict(self) -> dict[str, object]:
        """Numbers and dicts, without the enumeration of reasons."""
        values = {f.name: getattr(self, f.name) for f in fields(WindowCounts)}
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> WindowCounts:
        """The inverse of ``as_dict``, also by way of JSON, whose keys are strings."""
        counts = cls()
        for name, value in values.items():
            if isinstance(value, dict):
                key = int if name == "lengths" else str
                value = Counter({key(k): n for k, n in value.items()})
            setattr(counts, name, value)
        return counts


def _plain(value: object) -> object:
    if not isinstance(value, Counter):
        return value
    return {str(key) if isinstance(key, str) else key: n for key, n in value.items()}
