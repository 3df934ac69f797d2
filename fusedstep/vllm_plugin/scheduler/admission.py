"""Admission of waiting requests: is there room among the running ones, as far as turns have shown?

Stock's scheduler tries to admit at every turn. What a turn has shown stays true until something
changes, so there is no arithmetic here that could disagree with stock's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from fusedstep.vllm_plugin.compat import release_of, vllm_version

if TYPE_CHECKING:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

STARTABLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
# vLLM 0.32 counts the LoRA adapters of the requests that it schedules, 0.33 those of all that run.
COUNTS_SCHEDULED = release_of(vllm_version() or "0.33") < (0, 33)


class Admission:
    """The waiting queues of a scheduler and the free rows among its running requests."""

    def __init__(self, scheduler: AsyncScheduler) -> None:
        self.scheduler = scheduler
        self.blocked = False  # no waiting request fitted, and nothing has got free since
        # No waiting request fitted, and only because running requests hold blocks ahead.
        self.blocked_by_held = False
        self.min_blocks = 0  # free blocks that were too few for the next request

    @property
    def waiting_for_event(self) -> list[Request]:
        """Waiting requests that wait for an event outside of the scheduler."""
        received = self.scheduler.finished_recving_kv_req_ids  # their status changes with the turn
        deferred = (r for r in self.scheduler.deferred_waiting if r.status not in STARTABLE)
        return [r for r in deferred if r.request_id not in received]

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self.scheduler.kv_holding_waiting)

    @property
    def num_startable(self) -> int:
        """Waiting requests that need nothing but a row and blocks."""
        return self.num_waiting - len(self.waiting_for_event)

    @property
    def num_places(self) -> int:
        scheduler = self.scheduler
        taken = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        num_free: int = scheduler.max_num_active_reqs - taken
        return num_free

    @property
    def may_admit(self) -> bool:
        """May the coming turn admit a request, for all that is known?"""
        known = self.blocked or self.blocked_by_held
        return not known and self.num_places > 0 and self.num_startable > 0

    @property
    def is_open(self) -> bool:
        """Could a request that comes now be admitted, or is it the first to wait?"""
        known = self.blocked or self.blocked_by_held
        by_priority = self.scheduler.policy == SchedulingPolicy.PRIORITY
        joins = self.num_places > 0 and (by_priority or not known)
        return joins or self.num_startable == 0

    @property
    def awaits_kv(self) -> bool:
        """Does a KV connector load for a waiting request? A step's end tells when it has loaded:
        nobody announces it, and a window would end late."""
        status = RequestStatus.WAITING_FOR_REMOTE_KVS
        return any(request.status == status for request in self.waiting_for_event)

    @property
    def joins_anytime(self) -> bool:
        """Does a request wait for its grammar, which is compiled in the background, or for a KV
        connector, which is asked in every turn what it has, or still sends blocks of others?"""
        status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        if any(request.status == status for request in self.waiting_for_event):
            return True
        if not self.scheduler.connector:
            return False
        deferred = self.scheduler.deferred_waiting
        some_fit_then = self.num_places > 0 and self.num_startable > 0
        if some_fit_then and self.connector_keeps_blocks:
            return True
        return any(r.status in STARTABLE for r in deferred)

    @property
    def connector_keeps_blocks(self) -> bool:
        """Has a request ended whose blocks a KV connector has not sent yet?"""
        unfinished = len(self.scheduler.running) + self.num_waiting
        return len(self.scheduler.requests) > unfinished

    @contextmanager
    def adapters_keep_their_places(self, ending: list[Request]) -> Iterator[None]:
        """``ending`` sit this turn out, but may come back: vLLM 0.32 would give away the places of
        their LoRA adapters."""
        scheduler = self.scheduler
        config = scheduler.lora_config
        if not config or not COUNTS_SCHEDULED:
            yield
            return
        others = _adapters(request for request in scheduler.running if request not in ending)
        scheduler.lora_config = copy(config)
        scheduler.lora_config.max_loras -= len(_adapters(ending) - others)
        try:
            yield
        finally:
            scheduler.lora_config = config

    def on_queued(self, request: Request) -> None:
        """The request was queued. Behind others it changes nothing."""
        waiting = self.scheduler.waiting
        if self.waiting_for_event or (waiting and waiting.peek_request() is request):
            self.retry()

    def retry(self) -> None:
        """A row or blocks got free: the next turn may admit again."""
        self.blocked = self.blocked_by_held = False
        self.min_blocks = 0

    def has_room(self, num_blocks: int) -> None:
        """``num_blocks``: free blocks if nobody held any ahead. Sliding windows free some, too."""
        if num_blocks > self.min_blocks:
            self.blocked = False

    def record_turn(self, output: SchedulerOutput, num_free: int, tokens_ahead: int) -> None:
        """Learn from a turn that vLLM has scheduled.

        ``num_free``: blocks that it has left; ``tokens_ahead``: for how many running requests
        held blocks when it began.
        """
        scheduler = self.scheduler
        budget_left = scheduler.max_num_scheduled_tokens - output.total_num_scheduled_tokens
        stale = any(r.num_stale_output_tokens for r in scheduler.deferred_waiting)
        if self.num_startable == 0 or output.preempted_req_ids or stale:
            self.retry()
        elif self.num_places <= 0:
            self.blocked, self.blocked_by_held = True, False
        elif output.scheduled_new_reqs and budget_left == 0:
            self.retry()
        elif budget_left > 0 and (output.scheduled_new_reqs or not self.blocked):
            self.blocked, self.blocked_by_held = tokens_ahead == 0, tokens_ahead > 0
            if self.blocked:
                self.min_blocks = max(self.min_blocks, num_free)


def _adapters(requests: Iterable[Request]) -> set[int]:
    """The LoRA adapters that these requests use."""
    return {request.lora_request.lora_int_id for request in requests if request.lora_request}
