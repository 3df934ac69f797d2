"""A FusedStepScheduler that is watched: what would stock's not have done in its place?"""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request

from fusedstep.vllm_plugin.scheduler import in_flight
from fusedstep.vllm_plugin.scheduler.scheduler import FusedStepScheduler


class Watched(FusedStepScheduler):  # type: ignore[misc]
    """Notes what stock's scheduler would not have done in the same place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.faults: list[str] = []
        self.held = 0  # blocks that running requests hold, and stock's would not
        self.waits_since: tuple[str, float] | None = None  # who could have been admitted
        self.longest_wait = 0.0  # seconds

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        drafts = self.num_spec_tokens
        reserved = self.num_lookahead_tokens + (2 * (1 + drafts) if drafts else 0)  # by stock's
        self.held = sum(
            max(0, len(group.req_to_blocks[r.request_id]) - -(-tokens // group.block_size))
            for r in self.running
            for tokens in (r.num_tokens + reserved,)
            for group in self.blocks.groups
        )
        free = self.blocks.num_free + self.held
        output = super().schedule(*args, **kwargs)
        reserved = map(len, output.scheduled_spec_decode_tokens.values())
        placeholders = sum(number - drafts for number in reserved)
        if output.scheduled_new_reqs and placeholders > self.max_num_scheduled_tokens // 4:
            self.faults.append("placeholders took the token budget of a prefill")
        for request in map(self.requests.get, output.num_scheduled_tokens):
            end = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
            if drafts:  # how many of a round's tokens it will need is not known
                end = self.max_model_len - 1 + self.num_sampled_tokens_per_step
            if request.num_tokens + request.num_output_placeholders > end:
                self.faults.append(f"{request.request_id} has a reservation beyond its end")
        self._watch_the_door(free, output)
        return output

    def _watch_the_door(self, free: int, output: Any) -> None:
        """Is the next request still out, with a place and blocks that stock's would have?"""
        could = self.waiting and self.admission.num_places > 0 and not output.preempted_req_ids
        could = could and output.total_num_scheduled_tokens < self.max_num_scheduled_tokens
        head = self.waiting.peek_request() if could else None
        if head is None or self.blocks.needed(head, head.num_tokens) > free:
            self.waits_since = None
            return
        now = in_flight.time.monotonic()
        if self.waits_since is None or self.waits_since[0] != head.request_id:
            self.waits_since = head.request_id, now
        self.longest_wait = max(self.longest_wait, now - self.waits_since[1])

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if self.in_flight.has_window:
            self.faults.append(f"{request.request_id} preempted before a window came back")
        if self.last_decision.num_steps > 1:
            self.faults.append(f"{request.request_id} preempted for a window")
        if self.held:
            self.faults.append(f"{request.request_id} preempted, {self.held} blocks held ahead")
        super()._preempt_request(request, *args, **kwargs)
