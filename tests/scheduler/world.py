"""Schedulers and requests as the engine core makes them, of a model that has no weights."""

from __future__ import annotations

import json
import math
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from scheduler.trace import EOS, Trace
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from fusedstep.vllm_plugin import compat

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
}
STOCK: dict[bool, type[Scheduler]] = {True: AsyncScheduler, False: Scheduler}


@cache
def _model_config() -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        return ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32")


@cache
def _base_config() -> VllmConfig:
    init_none_hash(sha256)
    return VllmConfig(model_config=_model_config(), device_config=DeviceConfig("cpu"))


def _vllm_config(trace: Trace, decode_steps: str) -> VllmConfig:
    config = _copy(_base_config())
    config.model_config = _copy(_model_config())
    config.model_config.max_model_len = trace.max_model_len
    config.scheduler_config = SchedulerConfig(
        max_num_seqs=trace.max_num_seqs,
        max_num_batched_tokens=trace.max_num_batched_tokens,
        max_model_len=trace.max_model_len,
        is_encoder_decoder=False,
        policy="priority" if trace.by_priority else "fcfs",
        async_scheduling=trace.asynchronous,
    )
    config.cache_config = CacheConfig(
        block_size=trace.block_size, enable_prefix_caching=trace.prefix_caching
    )
    config.cache_config.num_gpu_blocks = trace.num_blocks
    config.cache_config.mamba_cache_mode = state_cache(trace)
    if trace.num_drafts:
        method = "draft_model" if trace.draft_model else "ngram"
        config.speculative_config = _speculative_config(trace.num_drafts, method)
        config.observability_config = ObservabilityConfig(
            per_request_spec_decode_metrics="detailed"
        )
    config.parallel_config = _copy(config.parallel_config)
    config.parallel_config.worker_cls = compat.WORKER_CLS
    config.additional_config = {
        "fusedstep": {"decode_steps": decode_steps, "window_latency_ms": trace.latency_ms}
    }
    return config


@cache
def _speculative_config(num_drafts: int, method: str) -> SpeculativeConfig:
    """Of n-grams; a draft model's is the same but for its name, by which a scheduler tells them."""
    config = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=num_drafts,
        prompt_lookup_max=3,
        target_model_config=_model_config(),
        target_parallel_config=ParallelConfig(),
    )
    config.method = method
    return config


def _copy(config: Any) -> Any:
    copied = object.__new__(type(config))
    copied.__dict__.update(config.__dict__)
    return copied


def make_scheduler(
    trace: Trace, kind: type[Scheduler], decode_steps: str = "1", switch: str = "on"
) -> Scheduler:
    """A scheduler with a KV cache of its own, as the engine core makes it."""
    size = trace.block_size
    shape = {"block_size": size, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**shape))]
    if trace.sliding_window:
        window = SlidingWindowSpec(**shape, sliding_window=2 * size + 1)
        groups.append(KVCacheGroupSpec(["sliding"], window))
    if trace.states:
        groups.append(KVCacheGroupSpec(["state"], _states(trace)))
    kv_cache_config = KVCacheConfig(trace.num_blocks, [], groups)
    config = _vllm_config(trace, decode_steps)
    unit = math.lcm(*(group.kv_cache_spec.block_size for group in groups))  # as vLLM resolves it
    with patch.dict(os.environ, VLLM_USE_V2_MODEL_RUNNER="1", FUSEDSTEP=switch):
        return kind(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=unit,
            hash_block_size=unit,
            log_stats=bool(trace.num_drafts),
        )


def state_cache(trace: Trace) -> str:
    return "align" if trace.states and trace.prefix_caching else "none"


def _states(trace: Trace) -> MambaSpec:
    mode = state_cache(trace)
    return MambaSpec(
        block_size=trace.block_size if mode == "align" else trace.max_model_len,
        shapes=((2 * trace.block_size,),),
        dtypes=(torch.float32,),
        mamba_cache_mode=mode,
        num_prefill_checkpoint_blocks=int(trace.checkpoints),
        prefill_checkpoint_alignment=1 if trace.checkpoints else None,
    )


def make_request(trace: Trace, number: int) -> Request:
    spec = trace.specs[number]
    params = SamplingParams(
        max_tokens=spec.max_tokens,
        min_tokens=spec.min_tokens,
        ignore_eos=spec.ignore_eos,
        stop_token_ids=list(spec.stop_token_ids),
        output_kind=RequestOutputKind.DELTA if spec.streams else RequestOutputKind.FINAL_ONLY,
        extra_args={"number": number},
    )
    params.update_from_generation_config({}, None if spec.ignore_eos else EOS)
    if spec.stop_string is not None:
        params.stop = ["a string"]
    hasher = get_request_block_hasher(trace.block_size, sha256) if trace.prefix_caching else None
    return Request(
        request_id=trace.name(number),
        prompt_token_ids=list(spec.prompt),
        sampling_params=params,
        pooling_params=None,
        arrival_time=float(spec.arrives),
        priority=spec.priority,
        block_hasher=hasher,
    )
