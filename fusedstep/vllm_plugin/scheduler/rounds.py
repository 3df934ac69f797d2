"""Speculative rounds in the engine core: how many a request can use; vLLM's counts of drafts."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

from fusedstep.vllm_plugin.stamps import rounds_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from fusedstep.window.output import Round


class RequestMetrics(RequestSpecDecodeMetrics):  # type: ignore[misc]
    """vLLM's counts of one request. A window is as many observations as it had rounds."""

    rounds: tuple[Round, ...] | None = None  # of the window that comes back

    def come_back(self, rounds: tuple[Round, ...] | None) -> None:
        """A batch comes back; None if it is no window with this request."""
        self.rounds = rounds

    def observe(self, num_draft_tokens: int, num_accepted: int, detailed: bool = False) -> None:
        drafts = min(num_draft_tokens, self.num_spec_tokens)
        for num_tokens, num_drafts in self.rounds or ((1 + num_accepted, drafts),):
            super().observe(num_drafts, num_tokens - 1, detailed)


class Rounds:
    """One per scheduler whose engine decodes speculatively."""

    def __init__(self, num_drafts: int, more_places: int, max_model_len: int) -> None:
        """``more_places``: that a request takes of a batch for its drafts, beside its tokens."""
        self.num_drafts, self.more_places = num_drafts, more_places
        self.max_model_len = max_model_len
        self.width = 1 + num_drafts  # the most tokens that a round gives
        self.given: dict[str, tuple[int, int]] = {}  # request_id -> rounds, their tokens
        self.asked: dict[str, Any] = {}  # request_id -> its RequestMetrics, if they are asked for
        self.returned: dict[str, tuple[Round, ...]] = {}  # of the window that comes back

    def enter(self, request: Request) -> None:
        """A request has come."""
        if request.spec_decode_metrics is not None:
            metrics = RequestMetrics.new(self.num_drafts)
            request.spec_decode_metrics = self.asked[request.request_id] = metrics

    def leave(self, request: Request) -> None:
        self.given.pop(request.request_id, None)
        self.asked.pop(request.request_id, None)

    def come_back(
        self, output: SchedulerOutput, result: ModelRunnerOutput, known: dict[str, Request]
    ) -> None:
        """A batch comes back. Its rounds, if it is a window, are counted before its tokens."""
        by_request = zip(result.req_ids, rounds_of(result) or (), strict=False)
        expected = set(known).intersection(output.num_scheduled_tokens)
        returned = {i: tuple(taken) for i, taken in by_request if taken and i in expected}
        for request_id, metrics in self.asked.items():
            metrics.come_back(returned.get(request_id))
        self.returned = returned
        for request_id, taken in returned.items():
            rounds, given = self.given.get(request_id, (0, 0))
            self.given[request_id] = rounds + len(taken), given + sum(n for n, _ in taken)

    def needed(self, request_id: str, num_tokens: int) -> int:
        """Rounds that a request is expected to take for so many tokens, at its own rate.

        Until that is known, as if every draft held: a round in vain costs more than a turn.
        """
        rounds, given = self.given.get(request_id, (0, 0))
        return ceil(num_tokens * rounds / given) if given else ceil(num_tokens / self.width)

    def room(self, decoding: list[tuple[Request, int]]) -> int:
        """Tokens that all may reserve: vLLM gives nobody a place beyond max_model_len."""
        last = max((request.num_computed_tokens for request, _ in decoding), default=0)
        return self.max_model_len - 1 - last

    def verified(
        self, request_id: str, num_drafts: int, num_accepted: int
    ) -> list[tuple[int, int]]:
        """Drafts, and how many of them held, of each round of the batch that comes back."""
        drafts = min(num_drafts, self.num_drafts)
        rounds = self.returned.get(request_id) or ((1 + num_accepted, drafts),)
        return [(drafts, n - 1) for n, drafts in rounds]
