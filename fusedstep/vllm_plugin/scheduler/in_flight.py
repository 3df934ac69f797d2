"""Batches between the scheduler and the device, and the time that their steps take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fusedstep.policy import Decision, StepTimes
from fusedstep.vllm_plugin.stamps import rounds_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request


@dataclass(frozen=True)
class Batch:
    """A batch that was scheduled and has not come back."""

    output: SchedulerOutput
    requests: dict[str, Any]  # id -> the Request that was scheduled
    decision: Decision
    num_steps: int  # that were reserved
    timed_size: int  # requests of a batch that decodes on the device, else 0
    since: float  # seconds
    tokens_per_step: int = 1  # above 1 they are speculative rounds

    def steps_of(self, result: ModelRunnerOutput) -> int:
        """Its steps that gave tokens."""
        return steps_of(result, self.tokens_per_step)

    def ended_at_stops(self, result: ModelRunnerOutput) -> bool:
        """Has it ended before its last step because so many requests have stopped?"""
        return self.decision.num_stops > 0 and self.steps_of(result) < self.num_steps

    def output_for(self, known: Mapping[str, Any]) -> SchedulerOutput:
        """The output as it was scheduled, for the requests that the scheduler knows now.

        A request's id may be used again while its tokens are under way: they are not the new
        request's.
        """
        others = {i for i, one in self.requests.items() if known.get(i, one) is not one}
        if not others:
            return self.output
        scheduled = self.output.num_scheduled_tokens
        return replace(
            self.output,
            num_scheduled_tokens={i: n for i, n in scheduled.items() if i not in others},
        )


class InFlight:
    """The batches that are under way, oldest first: one, or two with the batch queue."""

    def __init__(self, tokens_per_step: int = 1) -> None:
        """``tokens_per_step``: above 1 the steps are speculative rounds."""
        self.tokens_per_step = tokens_per_step
        self.step_times = StepTimes()
        self._batches: deque[Batch] = deque()
        self._last_returned = 0.0

    @property
    def has_window(self) -> bool:
        """Is one of more than a step under way?"""
        return any(batch.num_steps > 1 for batch in self._batches)

    def leaves_out(self, running: Iterable[Request]) -> bool:
        """Is some of these requests in none of the batches under way?"""
        scheduled = set().union(*(batch.requests for batch in self._batches))
        return any(request.request_id not in scheduled for request in running)

    def sent(
        self,
        output: SchedulerOutput,
        known: Mapping[str, Any],
        decision: Decision,
        *,
        on_device: bool,
        since: float,
    ) -> None:
        """``on_device``: it can be a window; else it takes one step, whose time does not count."""
        scheduled = output.num_scheduled_tokens
        reserved = max(scheduled.values(), default=0)
        steps = -(-reserved // self.tokens_per_step) if on_device else 1
        size = len(scheduled) if on_device else 0
        requests = {request_id: known[request_id] for request_id in scheduled}
        batch = Batch(output, requests, decision, steps, size, since, self.tokens_per_step)
        self._batches.append(batch)

    def returned(self, output: SchedulerOutput, result: ModelRunnerOutput) -> Batch | None:
        """Note its time from completion to completion; what was idle before does not count.

        None if the batch was not passed to ``sent``.
        """
        indices = [n for n, batch in enumerate(self._batches) if batch.output is output]
        if not indices:
            return None
        for _ in range(indices[0] + 1):
            batch = self._batches.popleft()
        now = time.monotonic()
        since, self._last_returned = max(batch.since, self._last_returned), now
        steps = batch.steps_of(result)
        if batch.timed_size and steps:
            self.step_times.add(batch.timed_size, steps, 1000 * (now - since))
        return batch


def steps_of(result: ModelRunnerOutput, tokens_per_step: int) -> int:
    """Steps of a batch that gave tokens; ``tokens_per_step``: above 1 they are rounds."""
    rounds = rounds_of(result)
    if rounds is not None:
        return max(map(len, rounds), default=0)
    num_tokens = max(map(len, result.sampled_token_ids), default=0)
    return num_tokens if tokens_per_step == 1 else min(num_tokens, 1)
