"""What vLLM's runner is made of. A window does what the parts named here do in a decode step.

A part that is not named may do something in every step that a window would leave out, which gives
wrong tokens: then all steps are vLLM's own.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

LOGITS_PROCESSORS = [LogitBiasState, PenaltiesState, BadWordsState]  # in this order
# Fields of a batch that a window honours, or that say nothing of its decode steps.
BATCH = {
    "scheduled_new_reqs",
    "scheduled_cached_reqs",
    "num_scheduled_tokens",
    "total_num_scheduled_tokens",
    "scheduled_spec_decode_tokens",
    "finished_req_ids",
    "free_encoder_mm_hashes",
    "preempted_req_ids",
    "has_structured_output_requests",
    "pending_structured_output_tokens",
    "num_invalid_spec_tokens",
    "new_block_ids_to_zero",
    "kv_cache_block_copies",
    "num_spec_tokens_to_schedule",
    "num_common_prefix_blocks",
    "scheduled_encoder_input_stats",
}
OTHER = tuple(field.name for field in fields(SchedulerOutput) if field.name not in BATCH)


def runner_reason(runner: GPUModelRunner) -> str | None:
    """Why windows would leave something out with this runner, or None. Its model is loaded."""
    state, sampler = runner.model_state, runner.sampler
    if type(state) is not DefaultModelState:
        return f"model state {type(state).__name__}"
    if state.num_new_sampled_tokens_per_step != 1:
        return "a model of several tokens per step"
    if type(sampler) is not Sampler:
        return f"sampler {type(sampler).__name__}"
    if [type(each) for each in sampler.logits_processors] != LOGITS_PROCESSORS:
        return "custom logits processors"
    if runner.kv_connector is not NO_OP_KV_CONNECTOR:
        return "KV connector"
    others = (
        (runner.adaptive_verification, "adaptive verification"),
        (runner.aux_output_connector, "auxiliary outputs"),
        (runner.encoder_cache, "multimodal model"),
        (runner.fast_prefill, "fast prefill of shared KV caches"),
        (runner.pcp_manager, "prefill context parallelism"),
        (runner.pooling_runner, "pooling model"),
        (runner.pp_handler, "pipeline parallelism"),
        (runner.rejection_sampler, "rejection sampler"),
        (runner.speculator, "speculative decoding"),
        (runner.ubatch_runner, "dual-batch overlap"),
    )
    return next((words for part, words in others if part is not None), None)


def batch_reason(scheduler_output: SchedulerOutput) -> str | None:
    """Why a window would leave out something of this batch, or None."""
    for name in OTHER:
        if getattr(scheduler_output, name):
            return f"a batch with {name.replace('_', ' ')}"
    return None
