"""Who waits for a place among the running requests, and whether one could be had.

Stock's scheduler tries to admit at every turn. What a turn has shown stays true until something
changes, so there is no arithmetic here that could disagree with stock's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

STARTABLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class House:
    """The waiting queues of a scheduler and the places among its running requests."""

    def __init__(self, scheduler: AsyncScheduler) -> None:
        self.scheduler = scheduler
        self.turned_away = False  # all who could start, and nothing has got free since
        self.crowded = False  # the same, but for blocks that running requests hold ahead
        self.room = 0  # free blocks that were too few for the next request

    @property
    def blocked(self) -> list[Request]:
        """Waiting requests that wait for an event outside of the scheduler."""
        return [r for r in self.scheduler.deferred_waiting if r.status not in STARTABLE]

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self.scheduler.kv_holding_waiting)

    @property
    def num_startable(self) -> int:
        """Waiting requests that need nothing but a place and blocks."""
        return self.num_waiting - len(self.blocked)

    @property
    def num_places(self) -> int:
        scheduler = self.scheduler
        taken = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        places: int = scheduler.max_num_active_reqs - taken
        return places

    @property
    def may_admit(self) -> bool:
        """May the coming turn admit a request, for all that is known?"""
        known = self.turned_away or self.crowded
        return not known and self.num_places > 0 and self.num_startable > 0

    @property
    def is_open(self) -> bool:
        """Could a request that comes now be admitted, or is it the first to wait?"""
        known = self.turned_away or self.crowded
        by_priority = self.scheduler.policy == SchedulingPolicy.PRIORITY
        joins = self.num_places > 0 and (by_priority or not known)
        return joins or self.num_startable == 0

    @property
    def joins_anytime(self) -> bool:
        """Does a request wait for its grammar, which is compiled in the background?"""
        status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        return any(request.status == status for request in self.blocked)

    def comes(self, request: Request) -> None:
        """The request was queued. Behind others it changes nothing."""
        waiting = self.scheduler.waiting
        if self.blocked or (waiting and waiting.peek_request() is request):
            self.got_free()

    def got_free(self) -> None:
        """A place or blocks: try again."""
        self.turned_away = self.crowded = False
        self.room = 0

    def has_room(self, num_blocks: int) -> None:
        """So many would be free in stock's place: a sliding window gives blocks back, too."""
        if num_blocks > self.room:
            self.turned_away = False

    def was_tried(self, output: SchedulerOutput, num_free: int, tokens_ahead: int) -> None:
        """What a turn has shown.

        ``num_free``: blocks that it has left; ``tokens_ahead``: for how many running requests
        held blocks when it began.
        """
        scheduler = self.scheduler
        budget_left = scheduler.max_num_scheduled_tokens - output.total_num_scheduled_tokens
        stale = any(r.num_stale_output_tokens for r in scheduler.deferred_waiting)
        if self.num_startable == 0 or output.preempted_req_ids or stale:
            self.got_free()
        elif self.num_places <= 0:
            self.turned_away, self.crowded = True, False
        elif output.scheduled_new_reqs and budget_left == 0:
            self.got_free()
        elif budget_left > 0 and (output.scheduled_new_reqs or not self.turned_away):
            self.turned_away, self.crowded = tokens_ahead == 0, tokens_ahead > 0
            if self.turned_away:
                self.room = max(self.room, num_free)
