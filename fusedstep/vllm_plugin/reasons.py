"""Why a batch takes a stock step, in words.

The scheduler (engine core process) and the runner (worker process) ask the same functions, so
they agree; the runner asks again because a wrong window would be a wrong answer.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 128


def engine_reason(vllm_config: VllmConfig) -> str | None:
    """Why no batch of this engine can decode in a window, or None."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    reasons = (
        (not vllm_config.use_v2_model_runner, "Model Runner V1"),
        (model.runner_type != "generate", "pooling model"),
        (model.is_encoder_decoder, "encoder-decoder model"),
        (model.supports_multimodal_inputs, "multimodal model"),
        (model.enable_prompt_embeds, "prompt embeddings"),
        (model.uses_mrope, "M-RoPE positions"),
        (model.is_hybrid or model.has_inner_state, "recurrent state"),
        (model.is_diffusion, "diffusion model"),
        (model.rswa_window is not None, "reference sliding-window attention"),
        (model.logits_processors, "custom logits processors"),
        (model.logprobs_mode != "raw_logprobs", f"logprobs mode {model.logprobs_mode}"),
        (model.return_sampling_mask, "sampling masks"),
        (model.enable_trace_replay, "trace replay"),
        (model.use_fp64_gumbel, "float64 Gumbel noise"),
        (vllm_config.watermark_config is not None, "watermarking"),
        (vllm_config.speculative_config is not None, "speculative decoding"),
        (vllm_config.lora_config is not None, "LoRA"),
        (vllm_config.kv_transfer_config is not None, "KV connector"),
        (vllm_config.ec_transfer_config is not None, "encoder-cache connector"),
        (vllm_config.aux_output_config.enabled, "auxiliary outputs"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (parallel.data_parallel_size > 1, "data parallelism"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism"),
        (parallel.enable_dbo, "dual-batch overlap"),
        (parallel.enable_eplb, "expert-parallel load balancing"),
        (os.environ.get("VLLM_COMPUTE_NANS_IN_LOGITS", "0") == "1", "NaN counting"),
        # It would take a window's tokens for one step's: it does not run our unfolding.
        (os.environ.get("VLLM_USE_RUST_FRONTEND", "0") == "1", "frontend in Rust"),
    )
    return next((words for applies, words in reasons if applies), None)


def request_reason(params: SamplingParams | None) -> str | None:
    """Why a batch with this request takes a stock step, or None."""
    if params is None:
        return "pooling request"
    reasons = (
        (params.structured_outputs is not None, "structured output"),
        (params.logprobs == -1 or (params.logprobs or 0) > MAX_LOGPROBS, "logprobs of all tokens"),
        (params.logprob_token_ids, "logprobs of given token ids"),
        (params.thinking_token_budget is not None, "thinking budget"),
        (len(params.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS, "more than 128 stop token ids"),
    )
    return next((words for applies, words in reasons if applies), None)
