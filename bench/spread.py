"""How times are taken, and how they scatter."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
HEAD_START = 20_000_000  # GPU cycles: the host has launched the timed work before the clock starts


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile, and the extremes."""

    p20: float
    p50: float
    p80: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        ordered = sorted(values)

        def quantile(q: float) -> float:
            rank = q * (len(ordered) - 1)
            low = int(rank)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)

        return cls(quantile(0.2), quantile(0.5), quantile(0.8), ordered[0], ordered[-1])


class Step(Protocol):
    """A decode step that can be taken again and again."""

    def rewind(self) -> None:
        """Back to the first step."""

    def fresh(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits to pass to ``step`` so that ``logits`` stays as it is."""

    def step(self, logits: torch.Tensor) -> Any:
        """Take a step with logits [num_reqs, V]."""


class Timer:
    """Microseconds per step of ``step``; each call measures once, from the first step on.

    On CUDA a call replays one graph of a step per buffer, or launches these steps one by one if
    they cannot be captured. On the CPU a call takes one step, each time on the next buffer.
    """

    def __init__(self, step: Step, buffers: torch.Tensor) -> None:  # [num_steps, num_reqs, V]
        self.step, self.buffers = step, buffers
        self.captured: bool | None = None
        self._turn = 0
        if buffers.device.type == "cuda":
            graph = _capture(self._run_all, step.rewind)
            self.captured = graph is not None
            self._run: Callable[[], None] = graph.replay if graph is not None else self._run_all
        for _ in range(2):
            self()

    def __call__(self) -> float:
        self.step.rewind()
        if self.captured is not None:
            return elapsed_us(self._run, self.buffers.device) / len(self.buffers)
        logits = self.step.fresh(self.buffers[self._turn % len(self.buffers)])
        self._turn += 1
        return elapsed_us(partial(self.step.step, logits), self.buffers.device)

    def _run_all(self) -> None:
        for logits in self.buffers:
            self.step.step(logits)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks, as tcmalloc does, which vLLM preloads where it has it.

    Otherwise large temporaries, which stock's sampler has and ours has not, are paid for with page
    faults in each step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def elapsed_us(work: Callable[[], Any], device: torch.device) -> float:
    """Microseconds of one call of ``work``; on CUDA between events around what it launches."""
    if device.type == "cpu":
        begin = time.perf_counter_ns()
        work()
        return (time.perf_counter_ns() - begin) / 1e3
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end))


def _capture(work: Callable[[], None], rewind: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """``work`` as a CUDA graph, after a warm-up on a side stream; None if it cannot be captured."""
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):
            rewind()
            work()
    current.wait_stream(side)
    rewind()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.set_stream(current)  # torch leaves its own stream set when a capture fails
        return None
    return graph


def count_launches(step: Step, logits: torch.Tensor) -> int | None:
    """Kernels of one step on CUDA, copies and fills by the driver not counted; None on the CPU.

    Also None where the profiler sees no kernels.
    """
    if logits.device.type == "cpu":
        return None
    step.rewind()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.step(logits)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names) or None


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second: the best of ten sums (read) and ten copies (read and write).

    Of float32, 1 GiB on CUDA and 256 MiB on the CPU, with all threads of torch.
    """
    num_bytes = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.zeros_like(source)
    works = ((source.sum, num_bytes), (partial(target.copy_, source), 2 * num_bytes))
    for work, _ in works:
        work()
    return max(1e6 * moved / elapsed_us(work, device) for work, moved in works for _ in range(10))
