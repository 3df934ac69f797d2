"""The engine core's part of a trace: turns, arrivals and first tokens, while a tracer asks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusedstep.vllm_plugin import stamps
from fusedstep.window import tracing

if TYPE_CHECKING:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

    from fusedstep.vllm_plugin.scheduler.in_flight import Batch


@dataclass(frozen=True)
class Turn:
    """A traced turn that has been scheduled. Times in ns."""

    since: int
    until: int
    new: list[str]  # requests that it admitted
    waiting: int
    running: int
    arrivals_seen: int
    num_stops: int  # after which its window ends; 0: all


class Tracing:
    """Off, it costs a look at a word of shared memory when a turn is scheduled, and one at an
    empty dict when it comes back."""

    def __init__(self, page: tracing.TracePage | None = None) -> None:
        self.page = page
        self.words = memoryview(bytes(tracing.SIZE)).cast("q") if page is None else page.words
        self.under_way: dict[int, Turn] = {}
        self._last = 0  # number of a turn
        self._fresh: set[str] = set()  # requests of the batch that comes back, without a token yet

    def begins(self) -> int:
        """Now, if a tracer asks, else 0."""
        if not self.words[0]:
            return 0
        now = time.monotonic_ns()
        return now if now < self.words[1] else 0

    def comes_back(self, output: SchedulerOutput, known: Mapping[str, Any]) -> int:
        """Now, if a traced turn is under way, else 0. Before its tokens are delivered."""
        if not self.under_way:
            return 0
        requests = (known.get(request_id) for request_id in output.num_scheduled_tokens)
        self._fresh = {r.request_id for r in requests if r and r.num_output_tokens == 0}
        return time.monotonic_ns()

    def write(self, record: dict[str, Any], number: int | None = None) -> None:
        """``number``: of the file, without it the one that is asked for."""
        assert self.page is not None
        tracing.append(self.page.path, number or self.words[0], record)

    def announced(self, kind: str, ids: list[str], *, ends_windows: bool) -> None:
        """Requests or aborts are on their way, or a row got free. Any thread."""
        if now := self.begins():
            self.write({"kind": kind, "at": now, "ids": ids, "ends_windows": ends_windows})

    def scheduled(self, since: int, output: SchedulerOutput, scheduler: AsyncScheduler) -> None:
        """A turn began at ``since`` (of ``begins``) and is scheduled."""
        self._last += 1
        stamp = stamps.stamp_of(output)
        self.under_way[self._last] = Turn(
            since,
            time.monotonic_ns(),
            [new.req_id for new in output.scheduled_new_reqs],
            len(scheduler.waiting),
            len(scheduler.running),
            *stamp,
        )
        self.words[2] = len(self.under_way)
        stamps.stamp_trace(output, stamps.TraceStamp(self.words[0], self._last))

    def returned(
        self,
        since: int,
        output: SchedulerOutput,
        batch: Batch | None,
        result: ModelRunnerOutput,
        num_arrivals: int,
    ) -> None:
        """The turn has come back; its tokens are delivered. ``num_arrivals``: the door's count."""
        stamp = stamps.trace_of(output)
        turn = None if stamp is None else self.under_way.pop(stamp.turn, None)
        if stamp is None or turn is None or batch is None:
            return
        self.words[2] = len(self.under_way)
        tokens = dict(zip(result.req_ids, map(len, result.sampled_token_ids), strict=False))
        steps = batch.steps_of(result)
        self.write(
            {
                "kind": "turn",
                "turn": stamp.turn,
                "schedule": [turn.since, turn.until],
                "update": [since, time.monotonic_ns()],
                "planned": batch.num_steps,
                "run": steps,
                "limit": batch.decision.reason,
                "ended": _why_ended(turn, batch, steps, num_arrivals),
                "requests": len(batch.requests),
                "tokens": sum(tokens.values()),
                "waiting": turn.waiting,
                "running": turn.running,
                "new": turn.new,
                "first": [i for i, n in tokens.items() if n and i in self._fresh],
                "finished": [i for i, one in batch.requests.items() if one.is_finished()],
            },
            stamp.file,
        )


def _why_ended(turn: Turn, batch: Batch, steps: int, num_arrivals: int) -> str:
    finished = [request.is_finished() for request in batch.requests.values()]
    if steps == batch.num_steps:
        return "all its steps are done"
    if all(finished):
        return "every request has ended"
    if turn.num_stops and any(finished):
        one = turn.num_stops == 1 and turn.waiting
        return "a request has ended, and others wait" if one else "a smaller batch is faster"
    if num_arrivals > turn.arrivals_seen:
        return "cut short" if steps else "gave way before its first step"
    return "no row could go on"
