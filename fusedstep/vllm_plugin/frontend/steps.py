"""A window's output, unfolded into decode steps of one token each, as vLLM's frontend expects them.

vLLM's streaming parsers, stop strings, chunk counts and statistics take every output of the engine
for one token. A window hands over several per request. Here they are taken apart before vLLM's
output processor sees them: step i holds the i-th token of every request, so the order among
requests is that of single steps too.
"""

from __future__ import annotations

from collections import deque
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

if TYPE_CHECKING:
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState


class Unwatched(EngineCoreOutput):  # type: ignore[misc]
    """Tokens that a step's statistics lack, of requests whose tokens are handed over whole.

    vLLM skips it, as it skips the output of a request that it does not know. Negative in the first
    step, which has all of those tokens; in each later step what is that step's.
    """

    num_tokens: int = 0


class Steps:
    """The decode steps of the engine's last output that vLLM has not been given yet.

    A step knows the request *states* it is for: when a request ends (a stop string, an abort) its
    later tokens are dropped, and do not go to a request that takes over its id.
    """

    def __init__(self, processor: OutputProcessor) -> None:
        self.processor = processor
        self.later: deque[tuple[EngineCoreOutputs, list[RequestState | None]]] = deque()

    def add(self, outputs: EngineCoreOutputs) -> EngineCoreOutputs:
        """The first step of what the engine handed over; ``next`` has the others."""
        if all(len(output.new_token_ids) < 2 for output in outputs.outputs):
            return outputs
        known = self.processor.request_states
        first: list[Any] = []
        watched: list[Any] = []
        states: list[Any] = []
        unwatched: list[int] = []  # tokens of each
        for output in outputs.outputs:
            state: RequestState | None = known.get(output.request_id)
            if len(output.new_token_ids) < 2 or state is None:
                first.append(output)
            elif is_watched(state):
                head, *tail = unfold(output)
                first.append(head)
                watched.append(tail)
                states.append(state)
            else:
                first.append(output)
                unwatched.append(len(output.new_token_ids))
        later = [
            [pair for pair in zip(step, states, strict=True) if pair[0] is not None]
            for step in zip_longest(*watched)
        ]
        if unwatched and self.processor.log_stats:
            first.append(_share(len(unwatched) - sum(unwatched)))
            for index in range(1, max(unwatched)):
                share = _share(sum(length > index for length in unwatched))
                if index > len(later):
                    later.append([])
                later[index - 1].append((share, None))
        self._wait(outputs, later)
        outputs.outputs = first
        return outputs

    def next(self) -> EngineCoreOutputs | None:
        """The next step in which there is something for anybody, None if there is none."""
        known = self.processor.request_states
        while self.later:
            step, states = self.later.popleft()
            step.outputs = [
                output
                for output, state in zip(step.outputs, states, strict=True)
                if state is None or known.get(output.request_id) is state
            ]
            if step.outputs:
                return step
        return None

    def _wait(
        self,
        outputs: EngineCoreOutputs,
        later: list[list[tuple[EngineCoreOutput, RequestState | None]]],
    ) -> None:
        stats = _gauges(outputs.scheduler_stats)
        for step in later:
            made = EngineCoreOutputs(
                engine_index=outputs.engine_index,
                outputs=[output for output, _ in step],
                scheduler_stats=stats,
                timestamp=outputs.timestamp,
                weight_version=outputs.weight_version,
            )
            self.later.append((made, [state for _, state in step]))


def count_unwatched(step: list[Any], stats: IterationStats | None) -> None:
    """Make the statistics of a step what they would be if no output held several tokens."""
    if stats is None or not step or not isinstance(step[-1], Unwatched):
        return
    num_tokens: int = step[-1].num_tokens
    stats.num_generation_tokens += num_tokens
    if num_tokens > 0:  # a token behind the first of its window comes together with that one
        stats.inter_token_latencies_iter.extend([0.0] * num_tokens)


def is_watched(state: RequestState) -> bool:
    """Could anybody tell whether this request's tokens come one by one?

    The final output alone is the same either way, unless a stop string may end it before them all.
    """
    if state.output_kind is not RequestOutputKind.FINAL_ONLY:
        return True
    return bool(getattr(state.detokenizer, "stop", None))


def unfold(output: EngineCoreOutput) -> list[EngineCoreOutput]:
    """One output per token: what stock vLLM would have handed over in as many steps.

    The first has what belongs to the prompt, the last what belongs to the end.
    """
    num_tokens = len(output.new_token_ids)
    logprobs, masks = output.new_logprobs, output.new_sampling_mask
    if logprobs is not None:
        logprobs = logprobs.slice_request(0, num_tokens)
    if masks is not None:
        masks = masks.slice_request(0, num_tokens)
    parts = []
    for index, token_id in enumerate(output.new_token_ids):
        part = EngineCoreOutput(
            output.request_id,
            [token_id],
            trace_headers=output.trace_headers,
            num_nans_in_logits=output.num_nans_in_logits,
        )
        if logprobs is not None:
            part.new_logprobs = logprobs.slice_request(index, 1)
        if masks is not None:
            part.new_sampling_mask = masks.slice_request(index, 1)
        if output.routed_experts is not None:  # a row per position; one of the last per token
            rows = len(output.routed_experts) - num_tokens + index + 1
            part.routed_experts = output.routed_experts[rows - 1 if index else 0 : rows]
        parts.append(part)
    first, last = parts[0], parts[-1]
    first.new_prompt_logprobs_tensors = output.new_prompt_logprobs_tensors
    first.prompt_token_id_logprobs = output.prompt_token_id_logprobs
    first.events = output.events
    first.prefill_stats = output.prefill_stats
    first.pooling_output = output.pooling_output
    first.mm_cache_miss_hashes = output.mm_cache_miss_hashes
    last.finish_reason = output.finish_reason
    last.stop_reason = output.stop_reason
    last.kv_transfer_params = output.kv_transfer_params
    last.ec_transfer_params = output.ec_transfer_params
    last.spec_decode_metrics = output.spec_decode_metrics
    if error := getattr(output, "error", None):  # vLLM 0.33
        last.error = error
    return parts


def _share(num_tokens: int) -> Unwatched:
    return Unwatched("", [], num_tokens=num_tokens)


def _gauges(stats: SchedulerStats | None) -> SchedulerStats | None:
    """The momentary values of the scheduler's statistics; its counts are in the first step."""
    if stats is None:
        return None
    return SchedulerStats(
        num_running_reqs=stats.num_running_reqs,
        num_waiting_reqs=stats.num_waiting_reqs,
        num_skipped_waiting_reqs=stats.num_skipped_waiting_reqs,
        num_kv_fetch_reqs_by_stage=stats.num_kv_fetch_reqs_by_stage,
        step_counter=stats.step_counter,
        current_wave=stats.current_wave,
        kv_cache_usage=stats.kv_cache_usage,
        waiting_lora_adapters=stats.waiting_lora_adapters,
        running_lora_adapters=stats.running_lora_adapters,
    )
