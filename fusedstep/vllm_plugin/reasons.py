"""Tests of an engine and of a request: can the device decode them, and if not, for which reason?

The scheduler (engine core process) and the runner (worker process) ask the same functions, so
they agree; the runner asks again because a wrong window would be a wrong answer.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fusedstep.ops.types import SamplingState
from fusedstep.policy import MAX_STEPS
from fusedstep.reasons import Reason
from fusedstep.vllm_plugin import compat

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, ParallelConfig, VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.kv_cache_interface import KVCacheConfig

# KV caches that windows were tested with, by name: others may have metadata that needs more.
KV_CACHES = (
    *("FullAttentionSpec", "SlidingWindowSpec", "MambaSpec", "CrossAttentionSpec"),
    "MLAAttentionSpec",
)
STATE_CACHES = (None, "none", "align")  # of recurrent states; None: a cache of keys and values
# Sampling parameters that a window honours, or that concern the prompt or the frontend only.
PARAMETERS = {
    *SamplingState.parameters(),
    *("n", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens"),
    *("min_tokens", "logprobs", "prompt_logprobs", "prompt_logprob_token_ids"),
    *("prompt_logprob_start", "logprob_token_ids", "flat_logprobs", "detokenize"),
    *("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
    *("output_kind", "stream_interval", "skip_clone", "output_text_buffer_length"),
    *("_eos_token_id", "_all_stop_token_ids", "_watermarking_skipped", "watermarking"),
    *("structured_outputs", "logit_bias", "allowed_token_ids", "extra_args", "bad_words"),
    *("_bad_words_token_ids", "skip_reading_prefix_cache", "thinking_token_budget"),
    *("repetition_detection", "routed_experts_prompt_start", "trace_decode_token_ids"),
}
MAX_STOP_TOKEN_IDS = 128
# KV connectors that a decode step has nothing to do for, by class and whatever their role. One of
# somebody's own says so of itself: ``decodes_in_windows = True`` in its class.
KV_CONNECTORS = {"vllm.distributed.kv_transfer.kv_connector.v1.example_connector.ExampleConnector"}
AUX_OUTPUTS = {"enable_return_routed_experts", "max_bytes"}  # the options of what we hand on
SPECULATION_METHODS = ("draft_model", "eagle", "eagle3", "mtp", "ngram", "ngram_gpu")
MOST_DRAFTS = MAX_STEPS // 2 - 1  # so that a window has room for two rounds
# Attention backends that take the host's upper bound of a length for the length: after a window
# that ended early it is too high.
PLAN_FROM_BOUND = frozenset({"FLASHINFER"})


def switch_reason() -> str | None:
    """None if fusedstep is switched on in the engine's processes and in its frontend's.

    Else nobody announces arrivals to a window, and nobody unfolds one for vLLM's frontend.
    """
    return None if compat.is_on() else Reason.NOT_SWITCHED_ON


def engine_reason(vllm_config: VllmConfig) -> str | None:
    """The reason that no batch of this engine can decode in a window, or None."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    on_cpu = vllm_config.device_config.device_type == "cpu"
    reasons = (
        *_speculation_reasons(vllm_config),  # vLLM may take its older runner for the drafter
        (not vllm_config.use_v2_model_runner, Reason.MODEL_RUNNER_V1),
        (model.runner_type != "generate", Reason.POOLING_MODEL),
        (model.is_encoder_decoder and not on_cpu, Reason.ENCODER_DECODER),
        (vllm_config.cache_config.use_replayssm, Reason.REPLAY_SSM),
        (vllm_config.mamba_config.enable_stochastic_rounding, Reason.ROUNDED_STATE),
        (model.is_diffusion, Reason.DIFFUSION),
        (model.rswa_window is not None, Reason.RSWA),
        (model.return_sampling_mask, Reason.SAMPLING_MASK),
        (model.enable_trace_replay, Reason.TRACE_REPLAY),
        (model.use_fp64_gumbel, Reason.FP64_GUMBEL),
        (vllm_config.watermark_config is not None, Reason.WATERMARK),
        *_connector_reasons(vllm_config),
        (vllm_config.ec_transfer_config is not None, Reason.EC_CONNECTOR),
        *_experts_reasons(vllm_config),
        (vllm_config.cache_config.kv_sharing_fast_prefill, Reason.FAST_PREFILL),
        (parallel.pipeline_parallel_size > 1, Reason.PIPELINE_PARALLEL),
        *_ranks_reasons(vllm_config),
        (parallel.decode_context_parallel_size > 1, Reason.DECODE_CONTEXT_PARALLEL),
        (parallel.prefill_context_parallel_size > 1, Reason.PREFILL_CONTEXT_PARALLEL),
        (parallel.enable_dbo, Reason.DBO),
        (parallel.enable_eplb, Reason.EPLB),
        (_has_several_schedulers(parallel), Reason.OWN_SCHEDULERS),
        (os.environ.get("VLLM_COMPUTE_NANS_IN_LOGITS", "0") == "1", Reason.NANS),
        # It would take a window's tokens for one step's: it does not run our unfolding.
        (os.environ.get("VLLM_USE_RUST_FRONTEND", "0") == "1", Reason.RUST_FRONTEND),
    )
    return next((words for applies, words in reasons if applies), None)


def _ranks_reasons(vllm_config: VllmConfig) -> tuple[tuple[bool, str], ...]:
    """Configurations that windows of data-parallel ranks were not tried with."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if parallel.data_parallel_size == 1:
        return ()
    on_cpu = vllm_config.device_config.device_type == "cpu"
    others = (
        (not on_cpu, "on a device that is not a CPU"),
        (parallel.tensor_parallel_size > 1, "with tensor parallelism"),
        (parallel.enable_expert_parallel, "with expert parallelism"),
        (parallel.enable_elastic_ep, "of elastic experts"),
        (vllm_config.speculative_config is not None, "with drafts"),
        (vllm_config.lora_config is not None, "with LoRA"),
        (vllm_config.kv_transfer_config is not None, "with a KV connector"),
        (model.is_hybrid, "with recurrent states"),
        (model.is_multimodal_model, "of a multimodal model"),
    )
    return tuple((applies, f"{Reason.DATA_PARALLEL} {words}") for applies, words in others)


def _has_several_schedulers(parallel: ParallelConfig) -> bool:
    """Each measures its own steps, and would decide on windows of its own."""
    is_launched = parallel.distributed_executor_backend == "external_launcher"
    return bool(is_launched and parallel.world_size > 1)


def _speculation_reasons(vllm_config: VllmConfig) -> tuple[tuple[bool, str], ...]:
    """Configurations that speculative rounds in a window do not know."""
    spec = vllm_config.speculative_config
    if spec is None:
        return ()
    return (
        (spec.method not in SPECULATION_METHODS, f"{Reason.SPECULATION} by {spec.method}"),
        (spec.num_speculative_tokens > MOST_DRAFTS, f"more than {MOST_DRAFTS} drafts"),
        (spec.parallel_drafting, f"{Reason.WITH_DRAFTS} parallel drafting"),
        (spec.enable_adaptive_verification, Reason.ADAPTIVE_VERIFICATION),
        (spec.uses_dynamic_speculative_decoding(), f"{Reason.WITH_DRAFTS} dynamic lengths"),
    )


def _connector_reasons(vllm_config: VllmConfig) -> tuple[tuple[bool, str], ...]:
    """KV connectors that have something to do for a decode step, and what none was tried with."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return ()
    named = f"{Reason.KV_CONNECTOR} {transfer.kv_connector}"
    known, promises = _known_connector(transfer)
    on_cpu = vllm_config.device_config.device_type == "cpu"
    in_parallel = vllm_config.parallel_config.tensor_parallel_size > 1
    return (
        (not known and not promises, named),
        (vllm_config.speculative_config is not None, f"{Reason.WITH_DRAFTS} a KV connector"),
        (vllm_config.model_config.is_hybrid, f"{Reason.KV_CONNECTOR} with recurrent states"),
        # vLLM's example has one file for all ranks, whose heads differ.
        (in_parallel and not promises, f"{named} with tensor parallelism"),
        (not on_cpu, f"{Reason.KV_CONNECTOR} on a device that is not a CPU"),
    )


def _experts_reasons(vllm_config: VllmConfig) -> tuple[tuple[bool, str], ...]:
    """Options that windows with routed experts were not tried with, and other outputs like them."""
    config = vllm_config.aux_output_config
    if not config.enabled:
        return ()
    others = (
        (vllm_config.speculative_config is not None, "with drafts"),
        (vllm_config.kv_transfer_config is not None, "with a KV connector"),
        (vllm_config.parallel_config.data_parallel_size > 1, "with data parallelism"),
        (vllm_config.parallel_config.tensor_parallel_size > 1, "with tensor parallelism"),
    )
    return (
        (vars(config).keys() - AUX_OUTPUTS != set(), Reason.AUX_OUTPUT),
        *((applies, f"{Reason.AUX_OUTPUT} {words}") for applies, words in others),
    )


def _known_connector(transfer: KVTransferConfig) -> tuple[bool, bool]:
    """Is this connector's class one of ours to know, and does it promise to leave decode steps
    alone? A subclass may do more than the class that promised."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    connector: Any = KVConnectorFactory.get_connector_class(transfer)
    known = f"{connector.__module__}.{connector.__qualname__}" in KV_CONNECTORS
    return known, vars(connector).get("decodes_in_windows") is True


def cache_reason(kv_cache_config: KVCacheConfig) -> str | None:
    """The reason that no batch on this KV cache can decode in a window, or None."""
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        for each in getattr(spec, "kv_cache_specs", {"": spec}).values():  # or one for each layer
            if type(each).__name__ not in KV_CACHES:
                return f"{Reason.KV_CACHE} {type(each).__name__}"
            mode = getattr(each, "mamba_cache_mode", None)
            if mode not in STATE_CACHES:
                return f"{Reason.STATE_CACHE} {mode}"
    return None


def request_reason(params: SamplingParams | None, *, drafts: bool = False) -> str | None:
    """The reason that a batch with this request takes a stock step, or None.

    ``drafts``: the engine decodes speculatively.
    """
    if params is None:
        return Reason.POOLING_REQUEST
    if drafts:
        others = (
            (params.logprob_token_ids is not None, "logprobs of given tokens"),
            (params.thinking_token_budget is not None, "a thinking budget"),
        )
        if words := next((words for applies, words in others if applies), None):
            return f"{Reason.WITH_DRAFTS} {words}"
    if len(params.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS:
        return Reason.STOP_TOKEN_IDS
    return _unknown_parameter(params)


def _unknown_parameter(params: Any) -> str | None:
    """A parameter that this request sets and that we have never heard of (msgspec's fields)."""
    unknown = (name for name in params.__struct_fields__ if name not in PARAMETERS)
    given = (name for name in unknown if getattr(params, name) not in (None, False))
    return next((f"{Reason.PARAMETER} {name}" for name in given), None)
