"""Everything of vLLM's frontend that unfolding uses (part of ``vllm_names.py``)."""

from __future__ import annotations

UNFOLDING = {
    "vllm.v1.engine": {
        "EngineCoreOutput": """
            (request_id, new_token_ids, trace_headers=_, num_nans_in_logits=_)
            request_id, new_token_ids, trace_headers, num_nans_in_logits, routed_experts
            new_prompt_logprobs_tensors, prompt_token_id_logprobs, events, prefill_stats
            pooling_output, mm_cache_miss_hashes, finish_reason, stop_reason
            kv_transfer_params, ec_transfer_params, spec_decode_metrics
            error since 0.33
            new_logprobs: LogprobsLists
            new_sampling_mask: SamplingMaskLists
        """,
        "EngineCoreReadyResponse": "data_parallel_rank, instance_id",
        "EngineCoreOutputs": """
            (engine_index=_, outputs=_, scheduler_stats=_, timestamp=_, weight_version=_)
            scheduler_stats: SchedulerStats
            outputs, engine_index, timestamp, weight_version
        """,
    },
    "vllm.v1.engine.output_processor": {
        "OutputProcessor": """
            def process_outputs(engine_core_outputs, engine_core_timestamp=None,
                                iteration_stats=None, weight_version=None)
            request_states, log_stats
        """,
        "OutputProcessorOutput": "",
        "RequestOutputCollector": """
            def __init__(output_kind, request_id)
            def put(output)
            def get()
            def get_nowait()
            aggregate, ready
        """,
        "RequestState": "output_kind, detokenizer",
    },
    "vllm.v1.engine.async_llm": {
        "AsyncLLM": """
            def __init__(*args, **kwargs)
            engine_core, vllm_config, output_processor
        """,
        "RequestOutputCollector": "",
    },
    "vllm.v1.engine.llm_engine": {
        "LLMEngine": """
            def __init__(*args, **kwargs)
            engine_core, vllm_config, output_processor
        """,
    },
    "vllm.v1.engine.exceptions": {"EngineDeadError": "()"},
    "vllm.v1.engine.core_client": {
        "InprocClient": "def get_output()\n+steps",
        "SyncMPClient": "def get_output()\noutputs_queue\n+steps",
        "MPClient": """
            def __init__(*args, **kwargs)
            def _apply_ready_response(payload)
            resources, utility_results, vllm_config
        """,
        "BackgroundResources": "engine_dead\n+client",
        "AsyncMPClient": "def get_output_async()\n+steps",
    },
    "vllm.v1.metrics.stats": {
        "RequestSpecDecodeMetrics": """
            def observe(num_draft_tokens, num_accepted, detailed=False)
            new(num_spec_tokens)
            num_spec_tokens
        """,
        "IterationStats": "num_generation_tokens, inter_token_latencies_iter",
        "SchedulerStats": """
            (num_running_reqs=_, num_waiting_reqs=_, num_skipped_waiting_reqs=_,
             num_kv_fetch_reqs_by_stage=_, step_counter=_, current_wave=_, kv_cache_usage=_,
             waiting_lora_adapters=_, running_lora_adapters=_)
            num_running_reqs, num_waiting_reqs, num_skipped_waiting_reqs
            num_kv_fetch_reqs_by_stage, step_counter, current_wave, kv_cache_usage
            waiting_lora_adapters, running_lora_adapters
        """,
    },
    "vllm.v1.outputs": {
        "LogprobsLists": "slice_request(req_idx, num_positions) -> LogprobsLists",
        "SamplingMaskLists": "slice_request(req_idx, num_positions) -> SamplingMaskLists",
    },
    "vllm.outputs": {
        "RequestOutput": "",
        "CompletionOutput": "index",
        "PoolingRequestOutput": "",
    },
    "vllm.sampling_params": {"RequestOutputKind": "CUMULATIVE"},
}
