"""Requests and pieces of streamed input that this engine cannot hold: answered here, and ended.

vLLM's own checks are in its frontend. It does not know how long a streamed input has become: a
piece too many would be written beyond the request's row.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from fusedstep.vllm_plugin import request_limits

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.fusedstep")


class Refusals:
    """Answers without tokens, which the next turn delivers."""

    def __init__(self, scheduler: AsyncScheduler) -> None:
        self.scheduler = scheduler
        self.answers: list[tuple[int, EngineCoreOutput]] = []  # client_index, answer
        self.full: set[Any] = set()  # sessions (Request) that had a piece too many

    @property
    def waiting(self) -> bool:
        """Does an answer wait for the next turn?"""
        return bool(self.answers)

    def refuses(self, request: Request) -> bool:
        """Has this new request, or new piece of a session, been answered?"""
        there: Request | None = self.scheduler.requests.get(request.request_id)
        if there is not None and there.streaming_queue is not None:
            waits = there.status == RequestStatus.WAITING_FOR_STREAMING_REQ
            if not (waits and request.resumable and self._overflows(there, request)):
                return False
            self._answer(request, FinishReason.LENGTH)
        elif there is not None:
            logger.warning("fusedstep: request id %s is in use", request.request_id)
            if request.client_index != there.client_index:
                self._answer(request, FinishReason.ERROR)
        elif self._is_too_long(request, request.num_prompt_tokens):
            self._answer(request, FinishReason.LENGTH)
        else:
            model = self.scheduler.vllm_config.model_config
            params, prompt = request.sampling_params, request.prompt_token_ids
            refused = request_limits.refusal(params, prompt, model)
            if refused is None:
                return False
            logger.error("fusedstep: request %s: %s %s", request.request_id, *refused)
            self._answer(request, FinishReason.ERROR)
        return True

    def refuse_pieces(self, session: Request) -> None:
        """A piece's answer has ended: those that queue behind it and do not fit end at once."""
        queue = session.streaming_queue
        while queue and queue[0] is not None and self._overflows(session, queue[0]):
            queue.popleft()
            self._answer(session, FinishReason.LENGTH)

    def forget(self, request: Request) -> None:
        self.full.discard(request)

    def deliver(self, outputs: Any) -> None:
        """Put the answers among a turn's outputs: client_index -> EngineCoreOutputs."""
        finished: dict[int, set[str]] | None = self.scheduler.finished_req_ids_dict
        for client, answer in self.answers:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(answer)
            if finished is not None and answer.request_id not in self.scheduler.requests:
                finished[client].add(answer.request_id)
        self.answers.clear()

    def _overflows(self, session: Request, piece: Any) -> bool:
        """Would the session reach max_model_len with this piece, or has it with one before?"""
        computed = session.num_computed_tokens - session.num_output_placeholders
        new: Collection[int] = piece.prompt_token_ids or ()
        if self._is_too_long(session, computed + len(new)):
            self.full.add(session)
        return session in self.full

    def _is_too_long(self, request: Request, num_tokens: int) -> bool:
        """Is there no room for a token after so many?"""
        longest: int = self.scheduler.max_model_len
        return request.sampling_params is not None and num_tokens >= longest

    def _answer(self, request: Request, reason: FinishReason) -> None:
        answer = EngineCoreOutput(
            request_id=request.request_id, new_token_ids=[], finish_reason=reason
        )
        self.answers.append((request.client_index, answer))
