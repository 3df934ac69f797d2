"""vLLM's engine loop around a real scheduler and a fake device, in device steps of time."""

from __future__ import annotations

import heapq
import queue
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from scheduler.device import Batch, Device
from scheduler.trace import Trace
from scheduler.world import make_request, make_scheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import RequestStatus

from fusedstep.vllm_plugin.scheduler import in_flight
from fusedstep.vllm_plugin.scheduler.door import forget_aborts
from fusedstep.vllm_plugin.scheduler.scheduler import FusedStepScheduler


class Clock:
    """Stands in for the module ``time``: the device's own time."""

    def __init__(self, step_ms: float) -> None:
        self.steps, self.step_ms = 0, step_ms

    def monotonic(self) -> float:
        return self.steps * self.step_ms / 1000


@dataclass
class Answer:
    """What a client got."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    first_at: int | None = None
    last_at: int = 0
    longest_pause: int = 0  # steps between two deliveries
    drafts: tuple[list[int], list[int]] | None = None  # verified and held, by round, at its end
    is_odd: bool = False  # a round with fewer drafts, or with none that a drafter had made


class Engine:
    """EngineCore's busy loop with (asynchronous) or without the batch queue."""

    def __init__(self, trace: Trace, kind: type[Scheduler], decode_steps: str = "1") -> None:
        self.trace = trace
        self.clock = Clock(trace.step_ms)
        self.scheduler: Any = make_scheduler(trace, kind, decode_steps)
        self.fused = isinstance(self.scheduler, FusedStepScheduler)
        count = (lambda: self.scheduler.door.counter.count) if self.fused else (lambda: 0)
        self.device = Device(trace, self.fused, count)
        self.answers = [Answer() for _ in trace.specs]
        self.numbers: dict[str, int] = {}  # id -> number of the request that has it now
        self.events: list[tuple[int, int, str]] = []
        for n, spec in enumerate(trace.specs):
            heapq.heappush(self.events, (spec.arrives, n, "add"))
            if spec.aborted_after is not None:
                heapq.heappush(self.events, (spec.arrives + spec.aborted_after, n, "end"))
        self.left: set[int] = set()  # numbers of requests whose client has sent an abort
        self.input: deque[tuple[str, int]] = deque()
        self.aborts: queue.Queue[list[str]] = queue.Queue()
        self.queue: deque[Batch] = deque()  # oldest first
        self.turns = self.steps = self.preemptions = 0
        self.drafts: Counter[str] = Counter()  # vLLM's statistics, summed

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def run(self) -> None:
        """To the end of all requests.

        Raises:
            AssertionError: more turns than can be.
        """
        longest = sum(s.max_tokens + len(s.prompt) for s in self.trace.specs)
        with self._device_time():
            while self.events or self.input or self.queue or self.scheduler.has_requests():
                self._take_in()
                if not self.queue and not self.scheduler.has_requests():
                    if not self.events:
                        break
                    self.clock.steps = max(self.clock.steps, self.events[0][0])
                    self._arrive()
                    continue
                self._turn()
                self.turns += 1
                assert self.turns < 50 + 10 * longest, "nothing gets on"
        self.scheduler.shutdown()

    @contextmanager
    def _device_time(self) -> Iterator[None]:
        with (
            patch.object(in_flight, "time", self.clock),
            patch("fusedstep.vllm_plugin.scheduler.scheduler.time", self.clock),
        ):
            yield

    def _arrive(self) -> None:
        """The input thread: what has come by now."""
        while self.events and self.events[0][0] <= self.clock.steps:
            _, number, kind = heapq.heappop(self.events)
            req_id = self.trace.name(number)
            if kind == "add":
                if self.fused:
                    forget_aborts(self.aborts, req_id)
                    self.scheduler.door.announce_request(req_id)
            else:
                self.left.add(number)
                self.aborts.put_nowait([req_id])
                if self.fused:
                    self.scheduler.announce_abort([req_id])
            self.input.append((kind, number))

    def _take_in(self) -> None:
        while self.input:
            kind, number = self.input.popleft()
            if kind == "add":
                self.numbers[self.trace.name(number)] = number
                self.scheduler.add_request(make_request(self.trace, number))
            else:
                self._abort([self.trace.name(number)])

    def _abort(self, req_ids: list[str]) -> None:
        for req_id in req_ids:
            if req_id in self.numbers:
                answer = self.answers[self.numbers[req_id]]
                answer.reason = answer.reason or "abort"
        self.scheduler.finish_requests(req_ids, RequestStatus.FINISHED_ABORTED)

    def _turn(self) -> None:
        if self.scheduler.has_requests():
            batch = Batch(self.scheduler.schedule())
            self.queue.append(batch)
            self._note_odd_rounds(batch.output)
            self.preemptions += len(batch.output.preempted_req_ids or ())
            executed = batch.output.total_num_scheduled_tokens > 0
            depth = 2 if self.trace.asynchronous else 1
            if len(self.queue) < depth and (executed or self.scheduler.has_requests()):
                return
        batch = self.queue.popleft()
        while not batch.done:
            self._step(batch)
        while not self.aborts.empty():
            self._abort(self.aborts.get_nowait())
        for _ in range(self.trace.lag):
            if not (self.queue and self._step(self.queue[0])):
                self.clock.steps += 1
                self._arrive()
        self.steps += batch.num_steps
        outputs = self.scheduler.update_from_output(batch.output, batch.result())
        for output in outputs[0].outputs if outputs else ():
            self._deliver(output)
        if self.trace.num_drafts:
            self._count_drafts(outputs[0].scheduler_stats.spec_decoding_stats)
            if not self.trace.asynchronous:
                ids = list(batch.output.num_scheduled_tokens)
                drafts = [[1] * self.trace.num_drafts for _ in ids]
                self.scheduler.update_draft_token_ids(DraftTokenIds(ids, drafts))

    def _note_odd_rounds(self, output: Any) -> None:
        """Which requests' drafts depend on what else runs?"""
        odd = set(output.preempted_req_ids or ())
        placeholders = output.scheduled_spec_decode_tokens
        odd |= {new.req_id for new in output.scheduled_new_reqs}.intersection(placeholders)
        for req_id in output.num_scheduled_tokens:
            request, num_drafts = self.scheduler.requests[req_id], len(placeholders.get(req_id, ()))
            if request.num_output_tokens and (1 + num_drafts) % self.device.width:
                odd.add(req_id)
        for req_id in odd:
            self.answers[self.numbers[req_id]].is_odd = True

    def _count_drafts(self, stats: Any) -> None:
        if stats is None:
            return
        self.drafts["rounds"] += stats.num_drafts
        self.drafts["drafts"] += stats.num_draft_tokens
        self.drafts["held"] += stats.num_accepted_tokens
        for n, held in enumerate(stats.num_accepted_tokens_per_pos):
            self.drafts[f"held at {n}"] += held
        for n, drafts in enumerate(stats.num_draft_tokens_per_pos):
            self.drafts[f"drafts at {n}"] += drafts

    def _step(self, batch: Batch) -> bool:
        if not self.device.step(batch):
            return False
        self.clock.steps += 1
        self._arrive()
        return True

    def _deliver(self, output: Any) -> None:
        number = self.numbers[output.request_id]
        answer, spec = self.answers[number], self.trace.specs[number]
        if answer.reason is not None:
            return
        now = self.clock.steps
        if answer.first_at is None:
            answer.first_at = now
        else:
            answer.longest_pause = max(answer.longest_pause, now - answer.last_at)
        answer.last_at = now
        answer.tokens += output.new_token_ids
        if output.spec_decode_metrics is not None:
            counted = output.spec_decode_metrics
            answer.drafts = counted.per_step_drafted, counted.per_step_accepted
        if spec.stop_string in answer.tokens:
            del answer.tokens[answer.tokens.index(spec.stop_string) + 1 :]
            answer.reason = "stop"
            if output.finish_reason is None and number not in self.left:
                heapq.heappush(self.events, (now, number, "end"))
                self._arrive()
        elif output.finish_reason is not None:
            answer.reason = str(output.finish_reason)
