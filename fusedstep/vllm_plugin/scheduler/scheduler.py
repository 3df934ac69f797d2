"""FusedStepScheduler: vLLM's AsyncScheduler, which reserves K tokens per decoding request.

A window of K steps looks to vLLM's scheduler like speculative decoding whose K-1 drafts are all
accepted: placeholders make it allocate KV-cache blocks for K tokens, and ``update_from_output``
takes back what the window did not use.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus

from fusedstep.policy import MAX_STEPS, Decision, DecodeSteps, Turn, decide
from fusedstep.reasons import Reason
from fusedstep.vllm_plugin import compat, reasons, shared, stamps
from fusedstep.vllm_plugin.grammar_tables import bring_grammars
from fusedstep.vllm_plugin.scheduler.admission import Admission
from fusedstep.vllm_plugin.scheduler.blocks import Blocks
from fusedstep.vllm_plugin.scheduler.counts import PublishedCounts
from fusedstep.vllm_plugin.scheduler.door import Door
from fusedstep.vllm_plugin.scheduler.grammars import Grammars
from fusedstep.vllm_plugin.scheduler.in_flight import InFlight, steps_of
from fusedstep.vllm_plugin.scheduler.refusals import Refusals
from fusedstep.vllm_plugin.scheduler.rounds import Rounds
from fusedstep.vllm_plugin.scheduler.tracing import Tracing
from fusedstep.window.arrivals import NEVER_END, ArrivalCounter
from fusedstep.window.tracing import TracePage

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

# Two windows under way and one to come: for no more tokens does a request hold blocks ahead.
MOST_AHEAD = 3 * MAX_STEPS

logger = logging.getLogger("vllm.fusedstep")


@dataclass(frozen=True)
class Running:
    """The running requests at the start of a turn."""

    decoding: list[tuple[Request, int]]  # and the tokens that each can still take
    prefilling: list[Request]
    ending: list[Request]  # what is in flight brings them to their end


class FusedStepScheduler(AsyncScheduler):  # type: ignore[misc]
    """With K fixed at 1 this takes exactly the turns of vLLM's AsyncScheduler.

    So does one that ``__init__`` has not seen, as tests of vLLM make it.
    """

    decode_steps = DecodeSteps(1)
    engine_reason: str | None = None
    has_freed = False  # a request has ended since the last turn
    grammars: Grammars | None = None  # None: stock vLLM masks for structured output
    rounds: Rounds | None = None  # None: no speculative decoding

    @cached_property
    def stock_reasons(self) -> dict[str, str]:
        """request_id -> why its batch takes stock steps."""
        return {}

    @cached_property
    def counts(self) -> PublishedCounts:
        return PublishedCounts()

    @cached_property
    def tracing(self) -> Tracing:
        return Tracing()

    @cached_property
    def in_flight(self) -> InFlight:
        return InFlight(self.tokens_per_step)

    @cached_property
    def admission(self) -> Admission:
        return Admission(self)

    @cached_property
    def refusals(self) -> Refusals:
        return Refusals(self)

    @cached_property
    def door(self) -> Door:
        return Door(ArrivalCounter(None))

    reserves_windows = True  # for the frontend: an output may hold several tokens

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = compat.options(self.vllm_config)
        self.decode_steps, self.latency_ms = options.decode_steps, options.window_latency_ms
        if self.decode_steps.fixed != 1:
            compat.refuse_foreign_worker(self.vllm_config)
        self.engine_reason = (
            reasons.switch_reason()
            or reasons.engine_reason(self.vllm_config)
            or reasons.cache_reason(self.kv_cache_config)
        )
        self.vocab_size = self.vllm_config.model_config.get_vocab_size()
        self.last_decision = Decision(1, Reason.NOTHING_DECODES)
        spec = self.vllm_config.speculative_config
        if spec is not None:
            more_places = spec.max_num_new_slots_for_drafting
            self.rounds = Rounds(self.num_spec_tokens, more_places, self.max_model_len)
        round_tokens = self.num_spec_tokens + self.num_lookahead_tokens
        self.blocks = Blocks(self.kv_cache_manager, self.max_model_len, round_tokens)
        counter = shared.arrival_counter(self.vllm_config)
        counter.unlink()  # the workers, started before, have it mapped
        rank = self.vllm_config.parallel_config.data_parallel_index
        self.tracing = Tracing(TracePage(shared.trace_path(self.vllm_config, rank), create=True))
        self.door = Door(counter, self.tracing)
        self.shares_memory = shared.workers_are_here(self.vllm_config)
        self.counts.page = shared.counts_page(self.vllm_config, rank)
        if self.engine_reason is not None:
            logger.warning("fusedstep: stock steps only (%s)", self.engine_reason)

    def ask_workers(self, executor: Any) -> None:
        """They know what the model is made of, and may have a reason for stock steps only.

        Without windows to come there is no need to reserve blocks and tokens for them.
        """
        if self.engine_reason is None and self.decode_steps.fixed != 1:
            told = executor.collective_rpc("no_windows_reason")
            self.engine_reason = next((reason for reason in told if reason), None)
            if self.engine_reason is not None:
                logger.warning("fusedstep: stock steps only (%s)", self.engine_reason)
                return
            if not self.vllm_config.model_config.skip_tokenizer_init:
                self.grammars = Grammars(self.structured_output_manager, self.vllm_config)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        since = self.tracing.begins()
        output = self._schedule(throttle_prefills)
        if since:
            self.tracing.scheduled(since, output, self)
        return output

    def _schedule(self, throttle_prefills: bool) -> SchedulerOutput:
        with self.counts.on_host():
            if self.engine_reason is None and self.decode_steps.fixed != 1:
                return self._schedule_window(throttle_prefills)
            output = super().schedule(throttle_prefills)
            decision = Decision(1, self.engine_reason or Reason.FIXED_AT_1)
            self.in_flight.sent(output, self.requests, decision, on_device=False, since=0.0)
            return output

    def _schedule_window(self, throttle_prefills: bool) -> SchedulerOutput:
        """Decide K at the start of the turn, where the waiting queue is in view."""
        # Before the look at what waits. Where a worker sees none, all take the same steps without.
        count = self.door.counter.count if self.shares_memory else NEVER_END
        since = time.monotonic()
        batch = self._look()
        self._reserve_window(batch)
        keep = self.admission.adapters_keep_their_places(batch.ending)
        with self._headroom() as tokens_ahead, keep:
            output = super().schedule(throttle_prefills)
        on_device = not (batch.prefilling or output.scheduled_new_reqs or self._stock_reason())
        self._bring_grammars(output, window=on_device)
        self.admission.record_turn(output, self.blocks.num_free, tokens_ahead)
        self.door.is_open = self.admission.is_open
        self.has_freed = False
        stamps.stamp(
            output,
            stamps.WindowStamp(self.door.seen(count), self.last_decision.num_stops),
        )
        decision = self.last_decision
        if output.scheduled_new_reqs:
            decision = Decision(1, Reason.PREFILL)
        elif self.admission.awaits_kv:  # if only since this turn
            decision = Decision(1, Reason.REMOTE_KV)
            stamps.stamp_stock_step(output, Reason.REMOTE_KV)
        self.in_flight.sent(output, self.requests, decision, on_device=on_device, since=since)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        scheduled = scheduler_output
        since = self.tracing.comes_back(scheduler_output, self.requests)
        with self.counts.on_host():
            batch = self.in_flight.returned(scheduler_output, model_runner_output)
            if batch is not None:
                scheduler_output = batch.output_for(self.requests)
            if self.rounds is not None:
                self.rounds.come_back(scheduler_output, model_runner_output, self.requests)
            if batch and batch.timed_size:
                gave_way = batch.num_steps > 1 and not any(model_runner_output.sampled_token_ids)
                self._take_back(scheduler_output, everything=gave_way)
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            self._follow_grammars(scheduler_output)
            received = model_runner_output.kv_connector_output
            if received is not None and (received.finished_recving or received.finished_sending):
                self.admission.retry()
            self.refusals.deliver(outputs)
            ended_at_stops = batch is not None and batch.ended_at_stops(model_runner_output)
            self._cut_windows_short(ended_at_stops)
        self.counts.add_turn(
            stamps.limit_of(model_runner_output)
            or (batch.decision.reason if batch else self.engine_reason or Reason.FIXED_AT_1),
            batch.num_steps if batch else 1,
            steps_of(model_runner_output, self.tokens_per_step),
            sum(map(len, model_runner_output.sampled_token_ids)),
            sum(map(bool, model_runner_output.sampled_token_ids)),
        )
        if self.counts.page is not None:
            self.counts.publish(now=not self.running)
        if since:
            num_arrivals = self.door.counter.count
            self.tracing.returned(since, scheduled, batch, model_runner_output, num_arrivals)
        return outputs

    def shutdown(self) -> None:
        self.counts.publish(now=True)
        if self.counts.page is not None:
            self.counts.page.unlink()
        if self.tracing.page is not None:
            self.tracing.page.unlink()
        super().shutdown()

    def has_requests(self) -> bool:
        return self.refusals.waiting or super().has_requests()

    def add_request(self, request: Request) -> None:
        self.door.received(request.request_id)
        if self.refusals.refuses(request):
            return
        super().add_request(request)
        self.admission.on_queued(request)
        if self.rounds is not None:
            self.rounds.enter(request)
        drafts = self.rounds is not None
        reason = reasons.request_reason(request.sampling_params, drafts=drafts)
        if request.use_structured_output and self.grammars is None:
            reason = reason or Reason.STRUCTURED_OUTPUT
        if reason is not None:
            self.stock_reasons[request.request_id] = reason

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        if isinstance(request_ids, str):
            request_ids = [request_ids]
        elif request_ids is not None:
            request_ids = list(request_ids)
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        self.door.aborts_received(request_ids or ())
        self._cut_windows_short()
        return finished

    def announce_abort(self, request_ids: list[str] | str) -> None:
        """Input thread: an abort is on its way. Windows end if that helps anybody."""
        aborted = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        running = {request.request_id for request in list(self.running)}
        if aborted & running and (self.waiting or running <= aborted):
            self.door.announce_abort(aborted)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """The host's masks for a stock step, which takes the placeholders of a window off."""
        reserved = scheduler_output.scheduled_spec_decode_tokens.items()
        drafts = {req_id: tokens[: self.num_spec_tokens] for req_id, tokens in reserved}
        single = replace(scheduler_output, scheduled_spec_decode_tokens=drafts)
        return super().get_grammar_bitmask(single)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """By round; None without speculation: a window's placeholders are not drafts."""
        if self.num_spec_tokens == 0:
            return None
        stats, most = spec_decoding_stats, min(num_draft_tokens, self.num_spec_tokens)
        num_valid = num_draft_tokens - (num_invalid_spec_tokens or {}).get(request_id, 0)
        verified = [(num_valid, num_accepted_tokens)]
        if self.rounds is not None:
            verified = self.rounds.verified(request_id, num_valid, num_accepted_tokens)
        for drafts, accepted in verified:
            self.counts.drafts += drafts
            self.counts.accepted_drafts += accepted
            invalid = {request_id: most - drafts}
            stats = super().make_spec_decoding_stats(stats, most, accepted, invalid, request_id)
        return stats

    def _handle_stopped_request(self, request: Request) -> bool:
        self.refusals.refuse_pieces(request)
        ended: bool = super()._handle_stopped_request(request)
        return ended

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.refusals.forget(request)
        self.stock_reasons.pop(request.request_id, None)
        if self.rounds is not None:
            self.rounds.leave(request)
        if self.grammars is not None and self.grammars.leave(request):
            # vLLM's matcher follows the device's tokens: it fails a request for one reason alone.
            self.counts.refused_tokens += request.status == RequestStatus.FINISHED_ERROR
        self.has_freed = True
        self.admission.retry()
        return super()._free_request(request, *args, **kwargs)

    def _bring_grammars(self, output: SchedulerOutput, *, window: bool) -> None:
        """New requests bring their grammars; the host masks where the device cannot."""
        if self.grammars is None:
            return
        for request in (self.requests[new.req_id] for new in output.scheduled_new_reqs):
            if request.use_structured_output:
                self._note_stock_reason(request, self.grammars.enter(request))
        bring_grammars(output, self.grammars.take_news())
        has_some = output.has_structured_output_requests
        if has_some and self.grammars.are_on_device(output, self.requests, window=window):
            # vLLM's engine core need not wait for the tokens in flight to mask the next ones.
            output.has_structured_output_requests = False
            output.pending_structured_output_tokens = False

    def _follow_grammars(self, output: SchedulerOutput) -> None:
        if self.grammars is None or not self.grammars.requests:
            return
        for request_id in output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            if request is not None and request_id in self.grammars.requests:
                self.grammars.follow(request)
                self._note_stock_reason(request, self.grammars.reason(request))

    def _note_stock_reason(self, request: Request, reason: str | None) -> None:
        if reason is not None:
            self.stock_reasons.setdefault(request.request_id, reason)

    def _look(self) -> Running:
        prefilling = [r for r in self.running if r.is_prefill_chunk]
        others = [(r, self._remaining(r)) for r in self.running if not r.is_prefill_chunk]
        decoding = [(request, remaining) for request, remaining in others if remaining > 0]
        ending = [request for request, remaining in others if remaining <= 0]
        return Running(decoding, prefilling, ending)

    def _remaining(self, request: Request) -> int:
        """Tokens the request can still take when everything in flight is delivered in full."""
        in_flight: int = request.num_output_placeholders
        to_max_tokens: int = request.max_tokens - request.num_output_tokens
        to_max_model_len: int = self.max_model_len - request.num_tokens
        return min(to_max_tokens, to_max_model_len) - in_flight

    @contextmanager
    def _headroom(self) -> Iterator[int]:
        """Raise vLLM's watermark during this turn, so that a newcomer cannot take blocks that a
        running request will need before all blocks held ahead are used.

        Yields the number of tokens until then.
        """
        manager = self.kv_cache_manager
        stock, ahead = manager.watermark_blocks, 0
        newcomers = min(self.admission.num_startable, self.admission.num_places)
        if newcomers > 0:
            ahead = self.blocks.most_tokens_ahead(self.running)
        if ahead:
            manager.watermark_blocks += newcomers * self.blocks.at_most(ahead)
            manager.watermark_blocks += self.blocks.to_go_on(self.running, ahead)
        try:
            yield ahead
        finally:
            manager.watermark_blocks = stock

    def _reserve_window(self, batch: Running) -> None:
        """Place K-1 placeholders on every running request that decodes."""
        for request in batch.ending:
            # Sit this turn out. If the window in flight ends early after all, the unused
            # reservation comes back and so does the request.
            request.next_decode_eligible_step = self.current_step + 2
        decision = self.last_decision = decide(self.decode_steps, self._turn(batch))
        if self.rounds is not None:  # one round has vLLM's own placeholders
            if decision.num_steps > 1:
                for request, _ in batch.decoding:
                    request.spec_token_ids = [-1] * (decision.num_steps * self.rounds.width - 1)
            return
        for request, remaining in batch.decoding:
            request.spec_token_ids = [-1] * (min(decision.num_steps, remaining) - 1)

    def _turn(self, batch: Running) -> Turn:
        admission, budget = self.admission, self.max_num_scheduled_tokens
        if admission.blocked and admission.num_places > 0:
            admission.has_room(self.blocks.num_free + self.blocks.held_ahead(self.running))
        if admission.num_waiting > 0 and admission.num_places > 0:
            budget //= 4  # a request that joins all the same has most of it for its prompt
        if self.rounds is not None:  # the drafter's own places, which vLLM takes off the batch
            budget -= self.rounds.more_places * len(batch.decoding)
        params = [request.sampling_params for request, _ in batch.decoding]
        step_ms, step_measured = self.in_flight.step_times.get(len(params))
        return Turn(
            remaining=self._remaining_steps(batch),
            prefill_in_flight=bool(batch.prefilling),
            may_admit=admission.may_admit,
            full_house=admission.num_startable > 0,
            joins_anytime=admission.joins_anytime,
            tokens_ahead=self.blocks.most_tokens_ahead(self.running)
            if admission.blocked_by_held
            else None,
            stoppable=self.shares_memory and self.door.counter.can_end_windows,
            stock_reason=self._stock_reason(),
            streams=any(p.output_kind is not RequestOutputKind.FINAL_ONLY for p in params),
            host_stops=any(p.stop or p.repetition_detection is not None for p in params),
            latency_ms=self.latency_ms,
            step_ms=step_ms,
            step_measured=step_measured,
            row_ms=self.in_flight.step_times.row_ms(len(params)),
            token_budget=budget,
            logprobs=self._logprobs(params),
            free_blocks=self.blocks.num_free,
            blocks_for=self._blocks_for(batch),
            state_block=self.blocks.state_block,
            tokens_per_step=self.tokens_per_step,
            room=MAX_STEPS if self.rounds is None else self.rounds.room(batch.decoding),
        )

    @property
    def tokens_per_step(self) -> int:
        """The most that a step of a window gives a request."""
        return 1 if self.rounds is None else self.rounds.width

    def _remaining_steps(self, batch: Running) -> list[int]:
        if self.rounds is None:
            return [remaining for _, remaining in batch.decoding]
        return [self.rounds.needed(r.request_id, n) for r, n in batch.decoding]

    def _logprobs(self, params: list[SamplingParams]) -> int:
        """Logprobs of a step: each row gets as many as the request that asks for the most."""
        asked = [len(p.logprob_token_ids or ()) for p in params]
        asked += [self.vocab_size if p.logprobs == -1 else p.logprobs or 0 for p in params]
        most = max(asked, default=0)
        return len(params) * (1 + most) if most else 0

    def _blocks_for(self, batch: Running) -> Callable[[int], int]:
        """Returns f(num_steps): blocks that must be free so that every running request can continue
        until a reservation of ``num_steps`` steps is used up, plus one token.

        The token is that of the next turn, which must preempt nobody while the window runs: its
        requests may have stopped, or need less than they reserved.
        """
        running = [request for request, _ in batch.decoding] + batch.ending
        plenty = len(running) * self.blocks.at_most(MOST_AHEAD)
        if 2 * plenty <= self.blocks.num_free:
            return lambda num_steps: plenty
        in_flight = max((r.num_output_placeholders for r in running), default=0)
        idle = self.blocks.most_tokens_ahead(batch.ending)
        held = self.blocks.most_tokens_ahead(running)

        def blocks_for(num_steps: int) -> int:
            num_tokens = num_steps * self.tokens_per_step
            return self.blocks.to_go_on(running, max(held, max(in_flight, idle) + num_tokens))

        return blocks_for

    def _cut_windows_short(self, ended_at_stops: bool = False) -> None:
        """End the windows in flight if a waiting request could start now, or nothing runs; or if
        they lack some who go on, having been scheduled for those left after all steps."""
        if not self.in_flight.has_window:
            return
        place_got_free = self.has_freed and self.admission.num_startable > 0
        too_few = ended_at_stops and self.in_flight.leaves_out(self.running)
        if place_got_free or not self.running or too_few:
            self.door.end_windows()
            self.tracing.announced("freed", [], ends_windows=True)

    def _take_back(self, output: SchedulerOutput, *, everything: bool) -> None:
        """A window gave way before its first step (``everything``), or rows sat it out, which left
        their grammars' tables in the one before: vLLM takes drafts back only beside a token."""
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            request: Request | None = self.requests.get(req_id)
            if request is None or request.is_finished() or request.num_stale_output_tokens:
                continue
            if everything or (self.grammars is not None and self.grammars.reason(request)):
                request.num_computed_tokens -= num_tokens
                request.num_output_placeholders -= num_tokens

    def _stock_reason(self) -> str | None:
        if self.admission.awaits_kv:
            return Reason.REMOTE_KV
        if not self.stock_reasons:
            return None
        reasons = (self.stock_reasons.get(r.request_id) for r in self.running)
        return next((reason for reason in reasons if reason), None)
