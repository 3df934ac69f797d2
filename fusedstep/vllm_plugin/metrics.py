"""Windows in vLLM's Prometheus endpoint and in the server's log: a vLLM stat logger.

The engine core writes its counts into shared memory (``scheduler/counts.py``); they are read when
somebody asks, here or at ``GET /fusedstep/explain`` (``frontend/explain_route.py``). With several
API servers vLLM's endpoint shows what prometheus_client writes itself, and not these; with an
engine on another machine there is nothing to read.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import StatLoggerBase

from fusedstep.counts import WindowCounts
from fusedstep.vllm_plugin import compat
from fusedstep.vllm_plugin.shared import counts_page, engine_is_here, trace_path

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.fusedstep")

engines: list[WindowStatLogger] = []  # of this process, those with our scheduler

COUNTERS = {
    "windows": "Turns of the scheduler with more than one decode step",
    "steps": "Decode steps of windows that gave tokens",
    "unused_steps": "Steps that were reserved for windows which ended before them",
    "idle_row_steps": "Steps of windows that rows sat out, having ended before",
    "early_exits": "Windows that ended before their last reserved step",
    "tokens": "Sampled tokens, all turns",
    "drafts": "Speculative tokens that were verified, all turns",
    "accepted_drafts": "Speculative tokens that held, all turns",
    "refused_tokens": "Tokens of structured output that the host's grammar refused: a fault",
    "host_seconds": "Time in the scheduler, all turns",
}


class WindowStatLogger(StatLoggerBase, Collector):  # type: ignore[misc]
    """One engine's windows. Silent where its scheduler is not ours, or on another machine."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.engine = str(engine_index)
        self.is_ours = vllm_config.scheduler_config.scheduler_cls == compat.SCHEDULER_CLS
        self.logged = WindowCounts()
        if not self.is_ours:
            return
        if not engine_is_here(vllm_config, engine_index):
            logger.warning(
                "fusedstep: engine %s is on another machine: its windows are not counted here",
                self.engine,
            )
            self.is_ours = False
            return
        self.page = counts_page(vllm_config, engine_index)
        self.trace = trace_path(vllm_config, engine_index)
        engines.append(self)
        atexit.register(self.page.unlink)  # an engine that was killed cannot
        atexit.register(self.trace.unlink, missing_ok=True)
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            REGISTRY.register(self)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's statistics of a step say nothing of windows."""

    def log_engine_initialized(self) -> None:
        """Nothing: the runner tells what runs."""

    def log(self) -> None:
        """One line for the last interval, if there were windows in it."""
        counts = self.counts() if self.is_ours else None
        if counts is None:
            return
        new, self.logged = counts.since(self.logged), counts
        if not new.windows:
            return
        turns = sorted(new.one_step_turns.items())
        reasons = ", ".join(f"{n} x {reason}" for reason, n in turns if n)
        logger.info(
            "fusedstep: %d windows of %.1f steps, %d ended early, %.3f host ms per token"
            "; one-step turns: %s",
            new.windows,
            new.steps_per_window,
            new.early_exits,
            new.host_ms_per_token,
            reasons or "none",
        )

    def describe(self) -> Iterator[Metric]:
        """Nothing: several engines of a server give metrics of the same names."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Called at every scrape."""
        info = GaugeMetricFamily(
            "fusedstep:trace_info",
            "Shared memory by which `fusedstep trace` asks for a trace",
            labels=["engine", "page"],
        )
        info.add_metric([self.engine, self.trace.name], 1)
        yield info
        counts = self.counts()
        if counts is None:
            return
        for name, words in COUNTERS.items():
            family = CounterMetricFamily(f"fusedstep:{name}", words, labels=["engine"])
            family.add_metric([self.engine], getattr(counts, name))
            yield family
        for name, words in (
            ("one_step_turns", "Turns of one decode step, by reason"),
            ("limits", "Windows, by what bound their length"),
        ):
            family = CounterMetricFamily(f"fusedstep:{name}", words, labels=["engine", "reason"])
            for reason, value in getattr(counts, name).items():
                family.add_metric([self.engine, reason], value)
            yield family
        histogram = HistogramMetricFamily(
            "fusedstep:window_steps", "Steps of a window that gave tokens", labels=["engine"]
        )
        buckets = [(str(bound), n) for bound, n in counts.lengths.items()]
        histogram.add_metric(
            [self.engine], [*buckets, ("+Inf", counts.windows)], sum_value=counts.steps
        )
        yield histogram

    def counts(self) -> WindowCounts | None:
        """Since the engine's start; None before its first turn."""
        values = self.page.read()
        return None if values is None else WindowCounts.from_dict(values)


def all_counts() -> WindowCounts | None:
    """Of this server's engines together; None before the first turn of any."""
    known = [counts for engine in engines if (counts := engine.counts()) is not None]
    return sum(known, WindowCounts()) if known else None
