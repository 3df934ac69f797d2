"""The parts of vLLM's runner. A window does what the parts named here do in a decode step.

A part that is not named may do something in every step that a window would leave out, which gives
wrong tokens: then all steps are vLLM's own.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector, KVConnector
from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner
from vllm.v1.worker.gpu.mm.rope import RopeState
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.encoder_decoder import EncoderDecoderModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner
from vllm.v1.worker.gpu.model_states.prompt_embeds import PromptEmbedsState
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.thinking_budget import ThinkingBudgetState
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.mtp.speculator import MTPSpeculator
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from fusedstep.reasons import Reason
from fusedstep.vllm_plugin.runner import latent_attention
from fusedstep.vllm_plugin.runner.recurrent import STATE_INDICES, is_recurrent

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

# Of a model state, by attribute: what prompts need of them, stock steps do.
INPUT_PARTS = {
    "encoder_runner": EncoderRunner,
    "mm_pruner": MultiModalPruner,
    "prompt_embeds_state": PromptEmbedsState,
    "rope_state": RopeState,
}
MODEL_STATES = (DefaultModelState, EncoderDecoderModelState, MambaHybridModelState)
# In this order. Behind them come the user's, which a window calls in every step.
LOGITS_PROCESSORS = [LogitBiasState, PenaltiesState, BadWordsState]
# Drafters that a round can ask as a stock step does.
SPECULATORS = (EagleSpeculator, MTPSpeculator, NgramGPUSpeculator, StandaloneARSpeculator)
# Builders of attention metadata that plan a decode step from the lengths and block tables alone.
BUILDERS = {
    "AiterFlashAttentionMetadataBuilder",
    "CPUAttentionMetadataBuilder",
    "FlashAttentionMetadataBuilder",
    "FlashInferMetadataBuilder",
    "FusedStepAttentionMetadataBuilder",
    latent_attention.BUILDER,
    "RocmAiterUnifiedAttentionMetadataBuilder",
    "RocmAttentionMetadataBuilder",
    "TritonAttentionMetadataBuilder",
}
CROSS_BUILDER = "CrossAttentionBuilder"  # vLLM makes it from one of those
OURS_AND_VLLMS = ("fusedstep.", "vllm.")
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
    "kv_connector_metadata",
    "aux_output_connector_metadata",
}
OTHER = tuple(field.name for field in fields(SchedulerOutput) if field.name not in BATCH)


def runner_reason(runner: GPUModelRunner) -> str | None:
    """The reason that windows would leave something out with this runner, or None."""
    state, sampler = runner.model_state, runner.sampler
    if type(state) not in MODEL_STATES:
        return f"{Reason.MODEL_STATE} {type(state).__name__}"
    if (reason := _inputs_reason(state)) is not None:
        return reason
    if state.num_new_sampled_tokens_per_step != 1:
        return Reason.TOKENS_PER_STEP
    if type(sampler) is not Sampler:
        return f"{Reason.SAMPLER} {type(sampler).__name__}"
    processors = [type(each) for each in sampler.logits_processors]
    if processors[: len(LOGITS_PROCESSORS)] != LOGITS_PROCESSORS:
        return f"{Reason.LOGITS_PROCESSORS} {', '.join(each.__name__ for each in processors)}"
    if type(sampler.thinking_budget_state) is not ThinkingBudgetState:
        return f"{Reason.SAMPLER} {type(sampler.thinking_budget_state).__name__}"
    if type(runner.kv_connector) not in (KVConnector, ActiveKVConnector):
        return f"{Reason.KV_CONNECTOR} {type(runner.kv_connector).__name__}"
    if type(runner.aux_output_connector) not in (type(None), AuxOutputWorkerConnector):
        return f"{Reason.AUX_OUTPUT} of {type(runner.aux_output_connector).__name__}"
    if (reason := _speculation_reason(runner)) is not None:
        return reason
    others = (
        (runner.adaptive_verification, Reason.ADAPTIVE_VERIFICATION),
        (runner.fast_prefill, Reason.FAST_PREFILL),
        (runner.pcp_manager, Reason.PREFILL_CONTEXT_PARALLEL),
        (runner.pooling_runner, Reason.POOLING_MODEL),
        (runner.pp_handler, Reason.PIPELINE_PARALLEL),
        (runner.ubatch_runner, Reason.DBO),
    )
    return next((words for part, words in others if part is not None), None)


def _speculation_reason(runner: GPUModelRunner) -> str | None:
    """The reason that speculative rounds would leave something out, or None."""
    speculator, sampler = runner.speculator, runner.rejection_sampler
    if speculator is None and sampler is None:
        return None
    if type(sampler) is not RejectionSampler:
        return f"{Reason.REJECTION_SAMPLER} {type(sampler).__name__}"
    if type(speculator) not in SPECULATORS:
        return f"{Reason.SPECULATION} by {type(speculator).__name__}"
    others = (
        (type(runner.model_state) is not DefaultModelState, "recurrent states"),
        (runner.uses_inputs_embeds, "embeddings as inputs"),
        (getattr(runner.model_state, "rope_state", None) is not None, "M-RoPE"),
        (len(runner.sampler.logits_processors) > len(LOGITS_PROCESSORS), "custom processors"),
    )
    return next((f"{Reason.WITH_DRAFTS} {words}" for applies, words in others if applies), None)


def _inputs_reason(state: DefaultModelState) -> str | None:
    """The reason that decode steps may have inputs of which ``ModelInputs`` knows nothing."""
    for name, known in INPUT_PARTS.items():
        part = getattr(state, name, None)
        if part is not None and type(part) is not known:
            return f"{Reason.MODEL_STATE} with {type(part).__name__}"
    if state.supports_mm_inputs and state.encoder_runner.is_realtime:
        return Reason.REALTIME  # media embeddings come while it decodes
    return None


def metadata_reason(runner: GPUModelRunner) -> str | None:
    """The reason that windows cannot plan a step for these layers, or None."""
    for group in (group for groups in runner.attn_groups for group in groups):
        builder = type(group.get_metadata_builder(0))
        if builder.__name__ == CROSS_BUILDER and builder.__module__.startswith(OURS_AND_VLLMS):
            builder = builder.__base__ or builder
        known = STATE_INDICES if is_recurrent(group) else BUILDERS
        if builder.__name__ not in known or not builder.__module__.startswith(OURS_AND_VLLMS):
            return f"{Reason.METADATA} {builder.__name__}"
        is_latent = builder.__name__ == latent_attention.BUILDER
        if is_latent and (reason := latent_attention.latent_reason(runner)) is not None:
            return reason
    return None


def batch_reason(scheduler_output: SchedulerOutput) -> str | None:
    """The reason that a window would leave out something of this batch, or None."""
    for name in OTHER:
        if getattr(scheduler_output, name):
            return f"{Reason.BATCH_WITH} {name.replace('_', ' ')}"
    return None
