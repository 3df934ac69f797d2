"""Everything of vLLM that fusedstep imports, extends, replaces, calls, reads or writes.

``tests/test_surface.py`` holds this list complete against our sources, and each supported vLLM
against the list. What belongs to Model Runner V2 is in ``vllm_runner_names.py``. A module has
names, a name has lines:

* ``max_num_reqs, device`` are attributes, ``waiting: RequestQueue`` one of a listed class or a
  container of it. Without a name before the colon the name itself is such an instance.
* ``add_request(req_id, max_tokens=_) -> X`` is a call of ours: arguments that we pass by position
  have vLLM's names for them, those by keyword ``=_``. Without a name it calls the name itself.
* ``def schedule(throttle_prefills=False)`` is a method that we override, with our parameters.
* ``+arrivals_seen`` is an attribute that we give to vLLM's object: vLLM must not have it.
* ``replaced`` marks a class that an object of ours stands in for: all of its methods are listed.
* ``since 0.33`` or ``until 0.33`` ends a line that does not hold for every version.
"""

from __future__ import annotations

from surface.vllm_attention_names import ATTENTION
from surface.vllm_frontend_names import UNFOLDING
from surface.vllm_grammar_names import STRUCTURED
from surface.vllm_runner_names import GPU, KERNELS, RUNNER, STATE_KERNELS
from surface.vllm_sampling_names import SAMPLING
from surface.vllm_speculation_names import SPECULATION

_CONFIG = {
    "vllm.config": {
        "VllmConfig": """
            ()
            additional_config, compute_hash, instance_id, use_v2_model_runner
            watermark_config
            lora_config, speculative_config, ec_transfer_config, structured_outputs_config
            kv_transfer_config: KVTransferConfig
            model_config: ModelConfig
            parallel_config: ParallelConfig
            scheduler_config: SchedulerConfig
            device_config: DeviceConfig
            aux_output_config: AuxOutputConfig
            cache_config: CacheConfig
            mamba_config: MambaConfig
        """,
        "CacheConfig": """
            kv_cache_memory_bytes, kv_sharing_fast_prefill, mamba_cache_mode, use_replayssm
        """,
        "KVTransferConfig": "kv_connector",
        "MambaConfig": "enable_stochastic_rounding",
        "ModelConfig": """
            runner_type, is_encoder_decoder, supports_multimodal_inputs
            is_diffusion, is_hybrid, is_multimodal_model, rswa_window
            return_sampling_mask, enable_trace_replay, use_fp64_gumbel, max_model_len
            model, skip_tokenizer_init
            get_vocab_size()
            try_get_generation_config()
        """,
        "ParallelConfig": """
            data_parallel_index, data_parallel_rank, data_parallel_size_local, worker_cls
            distributed_executor_backend, nnodes_within_dp, world_size
            pipeline_parallel_size, tensor_parallel_size
            data_parallel_size, decode_context_parallel_size, prefill_context_parallel_size
            enable_dbo, enable_eplb, enable_elastic_ep, enable_expert_parallel
        """,
        "SchedulerConfig": "async_scheduling, max_num_seqs, scheduler_cls",
        "DeviceConfig": "device_type",
        "AuxOutputConfig": "enabled",
    },
    "vllm.config.compilation": {
        "CompilationConfig": "cudagraph_mode: CUDAGraphMode",
        "CUDAGraphMode": "FULL, NONE, PIECEWISE\ndecode_mode()",
    },
    "vllm.envs": {
        "VLLM_USE_MODELSCOPE": "",
        "VLLM_MAX_NUM_BAD_WORDS": "",
        "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": "",
    },
    "vllm.exceptions": {"VLLMValidationError": "(message)"},
    "vllm.sampling_params": {
        "SamplingParams": """
            (**params)
            (seed=_, **params)
            (temperature=_, seed=_, **params)
            verify(model_config, speculative_config, structured_outputs_config, tokenizer)
            eos_token_id, logprob_token_ids, logprobs, max_tokens, output_kind, stop
            stop_token_ids, structured_outputs, thinking_token_budget, repetition_detection
            temperature, top_p, top_k, repetition_penalty, frequency_penalty, presence_penalty
            allowed_token_ids, all_stop_token_ids, bad_words_token_ids, logit_bias, min_tokens, n
            seed, stream_interval
        """,
        "RequestOutputKind": "FINAL_ONLY",
        "StructuredOutputsParams": "(**structured)",
    },
}

_FRONTEND = {
    "vllm": {
        "LLM": """
            (**options)
            def __init__(model, decode_steps=None, ops=None, loop=None,
                         window_latency_ms=None, rope=None, **vllm_kwargs)
            collective_rpc(method)
            collective_rpc(method, args=_)
            generate(prompts, sampling_params, use_tqdm=_, lora_request=_) -> RequestOutput
            get_tokenizer()
            llm_engine: LLMEngine
        """,
        "SamplingParams": "",
    },
    "vllm.multimodal": {"MULTIMODAL_REGISTRY": ": MultiModalRegistry"},
    "vllm.multimodal.registry": {"MultiModalRegistry": "get_processing_info(model_config)"},
    "vllm.model_executor.model_loader": {"get_model_cls": "(model_config)"},
    "vllm.v1.engine.llm_engine": {
        "LLMEngine": """
            model_config: ModelConfig
            vllm_config: VllmConfig
            add_request(request_id, prompt, params)
            has_unfinished_requests()
            step() -> RequestOutput
        """
    },
    "vllm.outputs": {
        "RequestOutput": """
            request_id, prompt, prompt_token_ids, finished
            outputs: CompletionOutput
        """,
        "CompletionOutput": "text, token_ids, finish_reason, stop_reason, logprobs",
    },
    "vllm.engine.arg_utils": {
        "EngineArgs": """
            add_cli_args(parser)
            create_engine_config
            additional_config, attention_backend, compilation_config, enforce_eager
            gpu_memory_utilization, hf_token, kv_cache_memory_bytes, model
            num_gpu_blocks_override, revision, scheduler_cls, served_model_name, worker_cls
            worker_extension_cls
        """,
    },
    "vllm.entrypoints.common.cli_args": {
        "FrontendArgs": """
            host, port, uds, api_key, ssl_certfile, middleware since 0.33
            +model_tag since 0.33
        """,
        "make_arg_parser": "(parser) since 0.33",
        "validate_parsed_serve_args": "(args) since 0.33",
    },
    "vllm.entrypoints.common.startup": {"cli_env_setup": "() since 0.33"},
    "vllm.entrypoints.launchers.cli_args": {
        "FrontendArgs": """
            host, port, uds, api_key, ssl_certfile, middleware until 0.33
            +model_tag until 0.33
        """,
        "make_arg_parser": "(parser) until 0.33",
        "validate_parsed_serve_args": "(args) until 0.33",
    },
    "vllm.entrypoints.serve.utils.api_utils": {"cli_env_setup": "() until 0.33"},
    "vllm.entrypoints.launchers.api_server.entry": {
        "setup_server": "(*args, **kwargs)",
        "serve_http": "(*args, timeout_graceful_shutdown=_, **kwargs)",
    },
    "vllm.entrypoints.cli.serve": {
        "ServeSubcommand": "cmd(args)",
        "setup_server": "",
        "wait_for_completion_or_failure": "(*args, **kwargs)",
    },
    "vllm.logger": {"configure_logging_from_args": "(args)"},
    "vllm.tokenizers": {"cached_tokenizer_from_config": "(model_config)"},
    "vllm.utils.argparse_utils": {"FlexibleArgumentParser": "(add_help=_)\n(prog=_)"},
    "vllm.utils.import_utils": {"resolve_obj_by_qualname": "(qualname)"},
}

_PLATFORM = {
    "vllm.platforms": {
        "cpu_platform_plugin": "()",
        "current_platform": ": Platform",
        "_current_platform": "",
    },
    "vllm.platforms.interface": {
        "Platform": "is_cpu()\nis_cuda_alike()\nget_device_name()\ndevice_type"
    },
    "vllm.platforms.cpu": {
        "CpuPlatform": """
            def get_vit_attn_backend(*args, **kwargs)
            def register_triton_kernel_overrides()
            def check_and_update_config(vllm_config)
        """,
    },
    "vllm.triton_utils": {"HAS_TRITON": ""},
    "vllm.triton_utils.dispatcher": {"register_kernels": "(overrides)", "sys": ""},
    "vllm.config.model": {"PROCESSED_LOGPROBS_MODES": ""},
    "vllm.config.lora": {"MaxLoRARanks": ""},
    "vllm.lora.request": {"LoRARequest": "(lora_name, lora_int_id, lora_path)"},
    "vllm.v1.sample.ops.topk_topp_sampler": {
        "HAS_TRITON": "",
        "apply_top_k_top_p": "(logits, k, p)",
    },
}

_ENGINE = {
    "vllm.v1.engine": {
        "EngineCoreRequest": """
            request_id, priority, prompt_token_ids, cache_salt, trace_headers
            sampling_params: sampling_params.SamplingParams
        """,
        "EngineCoreOutput": "(request_id=_, new_token_ids=_, finish_reason=_)\nrequest_id",
        "EngineCoreOutputs": "()",
        "FinishReason": "LENGTH, ERROR",
    },
    "vllm.v1.executor.abstract": {"Executor": "get_class(vllm_config)"},
    "vllm.v1.executor.multiproc_executor": {"MultiprocExecutor": ""},
    "vllm.v1.executor.uniproc_executor": {"UniProcExecutor": ""},
    "vllm.v1.engine.input_processor": {
        "InputProcessor": "process_inputs, vllm_config, model_config",
    },
    "vllm.v1.engine.output_processor": {
        "OutputProcessor": "add_request, request_states",
        "RequestState": "streaming_input, input_chunk_queue",
    },
    "vllm.v1.engine.core": {
        "EngineCore": """
            def __init__(*args, **kwargs)
            def preprocess_add_request(request)
            scheduler, aborts_queue, model_executor
        """,
        "EngineCoreProc": """
            run_busy_loop
            def _reject_add_while_paused(request) since 0.33
        """,
        "DPEngineCoreProc": "run_busy_loop",
    },
    "vllm.v1.request": {
        "Request": """
            is_finished()
            is_prefill_chunk, max_tokens, next_decode_eligible_step, num_computed_tokens
            num_output_placeholders, num_output_tokens, num_prompt_tokens, num_stale_output_tokens
            num_tokens, request_id, spec_token_ids, status
            spec_decode_metrics
            client_index, lora_request, prompt_token_ids, resumable, streaming_queue
            output_token_ids, structured_output_request, use_structured_output
            sampling_params: sampling_params.SamplingParams
        """,
        "RequestStatus": """
            WAITING, PREEMPTED, WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR, WAITING_FOR_STREAMING_REQ
            WAITING_FOR_REMOTE_KVS, FINISHED_ERROR
        """,
    },
    "vllm.v1.core.sched.async_scheduler": {
        "AsyncScheduler": """
            def __init__(*args, **kwargs)
            def schedule(throttle_prefills=False) -> SchedulerOutput
            def update_from_output(scheduler_output, model_runner_output)
            def shutdown()
            def add_request(request)
            def finish_requests(request_ids, finished_status) -> Request
            def make_spec_decoding_stats(spec_decoding_stats, num_draft_tokens,
                                         num_accepted_tokens, num_invalid_spec_tokens, request_id)
            def get_grammar_bitmask(scheduler_output)
            structured_output_manager: StructuredOutputManager
            def _free_request(request, *args, **kwargs)
            def _handle_stopped_request(request)
            def has_requests()
            finished_req_ids_dict
            connector, finished_recving_kv_req_ids
            current_step, lora_config, max_model_len, max_num_active_reqs, max_num_scheduled_tokens
            num_lookahead_tokens, num_spec_tokens, num_waiting_for_streaming_input, policy
            requests
            vllm_config: VllmConfig
            kv_cache_config: KVCacheConfig
            running, deferred_waiting: Request
            waiting, kv_holding_waiting: RequestQueue
            kv_cache_manager: KVCacheManager
        """,
    },
    "vllm.distributed.kv_transfer.kv_connector.factory": {
        "KVConnectorFactory": "get_connector_class(kv_transfer_config)",
    },
    "vllm.v1.core.sched.output": {
        "SchedulerOutput": """
            num_scheduled_tokens, total_num_scheduled_tokens, scheduled_spec_decode_tokens
            scheduled_new_reqs: NewRequestData
            scheduled_cached_reqs: CachedRequestData
            preempted_req_ids, finished_req_ids, aux_output_connector_metadata
            has_structured_output_requests, pending_structured_output_tokens
            +arrivals_seen, num_stops, grammars, stock_step_reason, trace
        """,
        "NewRequestData": "req_id, prompt_len\nsampling_params: sampling_params.SamplingParams",
        "CachedRequestData": "req_ids, num_computed_tokens",
        "GrammarOutput": "structured_output_request_ids, grammar_bitmask, num_acceptable_drafts",
    },
    "vllm.v1.core.sched.request_queue": {
        "RequestQueue": "peek_request() -> Request",
        "SchedulingPolicy": "PRIORITY",
    },
    "vllm.v1.core.kv_cache_manager": {
        "KVCacheManager": """
            watermark_blocks
            block_pool: BlockPool
            coordinator: KVCacheCoordinator
            empty_kv_cache_blocks: KVCacheBlocks
        """,
        "KVCacheBlocks": "blocks",
    },
    "vllm.v1.core.kv_cache_coordinator": {
        "KVCacheCoordinator": """
            single_type_managers: SingleTypeKVCacheManager
            get_num_blocks_to_allocate(
                request_id=_, num_tokens=_, new_computed_blocks=_, num_encoder_tokens=_,
                total_computed_tokens=_, num_local_computed_tokens=_, num_tokens_main_model=_)
        """,
    },
    "vllm.v1.core.single_type_kv_cache_manager": {
        "SingleTypeKVCacheManager": "block_size, req_to_blocks",
        "CrossAttentionManager": "",
        "MambaManager": "mamba_cache_mode, _checkpoints, block_size, req_to_blocks",
    },
    "vllm.v1.core.block_pool": {"BlockPool": "get_num_free_blocks()"},
    "vllm.v1.kv_cache_interface": {
        "KVCacheConfig": "num_blocks\nkv_cache_groups: KVCacheGroupSpec",
        "KVCacheGroupSpec": "kv_cache_spec",
        "SlidingWindowSpec": "sliding_window, extra_retained_tokens",
        "UniformTypeKVCacheSpecs": "first_spec",
    },
    "vllm.v1.metrics.loggers": {
        "StatLoggerBase": """
            def __init__(vllm_config, engine_index=0)
            def record(*args, **kwargs)
            def log_engine_initialized()
            def log()
        """,
    },
    "vllm.v1.spec_decode.metrics": {"SpecDecodingStats": ""},
    "vllm.v1.outputs": {
        "AsyncModelRunnerOutput": """
            def get_output()
            def get_kv_connector_output() since 0.33
        """,
        "ModelRunnerOutput": """
            (req_ids=_, req_id_to_index=_, sampled_token_ids=_, logprobs=_, kv_connector_output=_)
            req_ids, sampled_token_ids, aux_output_connector_output
            kv_connector_output: KVConnectorOutput
            +rounds, limit_reason
        """,
        "KVConnectorOutput": "finished_recving, finished_sending",
        "LogprobsLists": """
            (logprob_token_ids, logprobs, sampled_token_ranks, cu_num_generated_tokens)
        """,
        "LogprobsTensors": "logprob_token_ids, logprobs, selected_token_ranks",
    },
}

_KERNELS: dict[str, dict[str, str]] = {}
_WHOLE = {f"{GPU}.{_path}": _parameters for _path, _parameters in KERNELS.items()} | STATE_KERNELS
for _path, _parameters in _WHOLE.items():
    _module, _, _name = _path.rpartition(".")
    _KERNELS.setdefault(_module, {})[_name] = f"kernel {_parameters.strip()}"

SURFACE: dict[str, dict[str, str]] = {}  # module -> name -> lines
_PARTS = (
    _CONFIG,
    _FRONTEND,
    _PLATFORM,
    _ENGINE,
    RUNNER,
    SAMPLING,
    _KERNELS,
    ATTENTION,
    UNFOLDING,
    STRUCTURED,
    SPECULATION,
)
for _part in _PARTS:
    for _module, _names in _part.items():
        _known = SURFACE.setdefault(_module, {})
        for _name, _lines in _names.items():
            _known[_name] = f"{_known.get(_name, '')}\n{_lines}".strip()

# Environment variables of vLLM that we read or set.
ENVIRONMENT = (
    "VLLM_CACHE_ROOT",
    "VLLM_COMPUTE_NANS_IN_LOGITS",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_NUM_OF_RESERVED_CPU",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_LOGGING_LEVEL",
    "VLLM_LOGGING_STREAM",
    "VLLM_NO_USAGE_STATS",
    "VLLM_PLUGINS",
    "VLLM_USE_RUST_FRONTEND",
    "VLLM_USE_V2_MODEL_RUNNER",
)
# What a module must say in its source: messages and errors that we look for, entry points.
SAYS = {
    "vllm.v1.engine.core": ("EngineCore failed to start",),
    "vllm.v1.executor.multiproc_executor": ("WorkerProc failed to start",),
    "vllm.v1.engine.exceptions": ("class EngineDeadError",),
    "vllm.plugins": ("vllm.platform_plugins", "vllm.general_plugins"),
    "vllm.entrypoints.launchers.launcher": ("dummy_shutdown",),
    "vllm.config.scheduler": ("Using custom scheduler class",),
}
