"""How busy the GPU was, and with which kernels: the share of a span that they leave free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

Interval = tuple[float, float]  # begin, end; microseconds
Kernel = tuple[float, float, str]  # and its name

# Of a traced generate: prefill and the first windows before it, the last window after it.
STEADY = 0.25, 0.95
# Kernels of a decode step, at least: a trace with fewer per step has not seen the steps. Of a WHILE
# node's body the profiler shows none (H100, CUDA 13.0).
KERNELS_PER_STEP = 2
MOST_NAMES = 20


@dataclass(frozen=True)
class Share:
    """The kernels of one name in the steady part, and their part of the time of all."""

    name: str
    count: int
    share: float


@dataclass(frozen=True)
class Trace:
    """The kernels of one generate; ``idle_share`` is None where ``reason`` says why."""

    num_kernels: int
    idle_share: float | None
    reason: str = ""
    longest: tuple[Share, ...] = ()


def union_length(intervals: Iterable[Interval]) -> float:
    """Length of the union: time in which at least one interval is open."""
    total, reach = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reach), 0.0)
        reach = max(reach, end)
    return total


def clipped(intervals: Iterable[Interval], begin: float, end: float) -> list[Interval]:
    """The parts of the intervals that lie between ``begin`` and ``end``."""
    cut = ((max(a, begin), min(b, end)) for a, b in intervals)
    return [(a, b) for a, b in cut if a < b]


def summarise(kernels: list[Kernel], num_steps: int) -> Trace:
    """The steady part of a generate with ``num_steps`` decode steps."""
    if not kernels:
        return _unseen(0, num_steps)
    first, last = min(a for a, _, _ in kernels), max(b for _, b, _ in kernels)
    begin, end = (first + part * (last - first) for part in STEADY)
    steady = [(a, b, name) for a, b, name in kernels if begin <= a < end]
    if len(steady) < KERNELS_PER_STEP * num_steps * (STEADY[1] - STEADY[0]):
        return _unseen(len(kernels), num_steps)
    busy = union_length(clipped(((a, b) for a, b, _ in kernels), begin, end))
    return Trace(len(kernels), 1 - busy / (end - begin), longest=_longest(steady))


def _longest(kernels: list[Kernel]) -> tuple[Share, ...]:
    """By name, those that took most of the time."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for begin, end, name in kernels:
        times[name].append(end - begin)
    total = sum(map(sum, times.values())) or 1.0
    shares = (Share(name, len(each), sum(each) / total) for name, each in times.items())
    return tuple(sorted(shares, key=lambda share: -share.share)[:MOST_NAMES])


def _unseen(num_kernels: int, num_steps: int) -> Trace:
    return Trace(num_kernels, None, f"the profiler saw {num_kernels} kernels in {num_steps} steps")
