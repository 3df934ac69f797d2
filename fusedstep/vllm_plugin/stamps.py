"""Marks that the scheduler and the workers hang on vLLM's outputs for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fusedstep.window import arrivals

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

    from fusedstep.window.output import Round


class WindowStamp(NamedTuple):
    """A window's terms, from the scheduler to the worker, on vLLM's SchedulerOutput."""

    arrivals_seen: int
    num_stops: int  # rows that stop before it ends; 0: all


def stamp(output: SchedulerOutput, window: WindowStamp) -> None:
    output.arrivals_seen, output.num_stops = window


def stamp_of(output: SchedulerOutput) -> WindowStamp:
    """Batches that were scheduled with K fixed at 1 bear none: they run to their end."""
    if not hasattr(output, "arrivals_seen"):
        return WindowStamp(arrivals.NEVER_END, num_stops=0)
    return WindowStamp(output.arrivals_seen, output.num_stops)


def stamp_stock_step(output: SchedulerOutput, reason: str) -> None:
    """The worker takes one stock step, whatever was reserved."""
    output.stock_step_reason = reason


def stock_step_of(output: SchedulerOutput) -> str | None:
    """The reason of such a step, or None."""
    return getattr(output, "stock_step_reason", None)


class TraceStamp(NamedTuple):
    """Numbers of a traced turn, and of the file of its trace."""

    file: int
    turn: int


def stamp_trace(output: SchedulerOutput, trace: TraceStamp) -> None:
    output.trace = trace


def trace_of(output: SchedulerOutput) -> TraceStamp | None:
    return getattr(output, "trace", None)


def report_limit(output: ModelRunnerOutput, reason: str) -> None:
    """The worker has run fewer steps than the scheduler reserved, for this reason."""
    output.limit_reason = reason


def limit_of(output: ModelRunnerOutput) -> str | None:
    return getattr(output, "limit_reason", None)


def report_rounds(output: ModelRunnerOutput, rounds: list[list[Round]]) -> None:
    """``rounds``: of each request of the batch, those that gave it tokens."""
    output.rounds = rounds


def rounds_of(output: ModelRunnerOutput) -> list[list[Round]] | None:
    """None where the batch was no window of speculative rounds."""
    return getattr(output, "rounds", None)


def has_whole_rounds(scheduler_output: SchedulerOutput, width: int) -> bool:
    """Has each request the same number of speculative rounds, with all drafts in each?

    ``width``: the tokens of a round; 1 without speculation. Else the worker takes a stock step.
    """
    num_tokens = set(scheduler_output.num_scheduled_tokens.values())
    return width == 1 or (len(num_tokens) == 1 and num_tokens.pop() % width == 0)
