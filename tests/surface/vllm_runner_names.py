"""The part of ``vllm_names.py``'s list that is vLLM's workers, Model Runner V2 and its kernels."""

from __future__ import annotations

GPU = "vllm.v1.worker.gpu"

RUNNER = {
    "vllm.distributed.aux_output_connector.connector": {"AuxRequestOutput": ""},
    "vllm.distributed.aux_output_connector.worker": {
        "AuxOutputWorkerConnector": """
            begin_step(metadata)
            prepare_output(input_batch) -> PendingAuxOutput
            process_output(pending)
            _capturer: RoutedExpertsCapturer
            _requests: _WorkerRequestState
        """,
        "PendingAuxOutput": """
            connector, query_start_loc, request_ids, token_starts
            num_rejected, num_sampled, routed_experts
            process_output()
        """,
        "_WorkerRequestState": "capture_cursor",
    },
    "vllm.model_executor.layers.fused_moe.routed_experts_capturer": {
        "RoutedExpertsCapturer": "device_buffer, output_dtype_name, shape_per_token",
    },
    "vllm.distributed.parallel_state": {
        "GroupCoordinator": "cpu_group, ranks, world_size",
        "get_dp_group": "() -> GroupCoordinator",
        "get_tp_group": "() -> GroupCoordinator",
        "graph_capture": "(device=_)",
        "is_global_first_rank": "()",
    },
    "vllm.forward_context": {
        "BatchDescriptor": "(num_tokens=_, has_lora=_, num_active_loras=_)\n(num_tokens=_)",
        "set_forward_context": """
            (attn_metadata, vllm_config, num_tokens=_, num_tokens_across_dp=_,
             cudagraph_runtime_mode=_, batch_descriptor=_, slot_mapping=_, is_padding=_)
            (attn_metadata, vllm_config, num_tokens=_, cudagraph_runtime_mode=_,
             batch_descriptor=_, slot_mapping=_, is_padding=_)
            (attn_metadata, vllm_config, num_tokens=_, batch_descriptor=_, slot_mapping=_,
             is_padding=_)
            (attn_metadata, vllm_config, num_tokens=_, batch_descriptor=_, slot_mapping=_)
        """,
        "get_forward_context": "()",
        "override_forward_context": "(forward_context)",
    },
    "vllm.v1.attention.backend": {
        "AttentionBackend": "get_name()",
        "CommonAttentionMetadata": """
            (query_start_loc=_, query_start_loc_cpu=_, seq_lens=_, seq_lens_cpu_upper_bound=_,
             max_seq_len=_, num_reqs=_, num_actual_tokens=_, max_query_len=_,
             block_table_tensor=_, slot_mapping=_, positions=_, is_prefilling=_)
            encoder_seq_lens, encoder_seq_lens_cpu, max_seq_len, num_reqs
            _num_computed_tokens_cache
        """,
    },
    "vllm.v1.worker.utils": {
        "AttentionGroup": """
            build_metadata(common_attn_metadata, ubatch_idx)
            update_draft_decode_metadata(attn_metadata)
            map_to_kernel_block_table(block_table)
            get_metadata_builder(ubatch_id)
            kv_cache_group_id, layer_names, supports_draft_decode_metadata_update
            kv_cache_spec
            backend: AttentionBackend
        """,
    },
    "vllm.v1.worker.gpu_worker": {
        "Worker": """
            def init_device()
            def _make_model_runner()
            def execute_model(scheduler_output)
            def sample_tokens(grammar_output)
            def execute_dummy_batch()
            is_driver_worker
            device, use_v2_model_runner
            vllm_config: VllmConfig
            model_runner: GPUModelRunner
        """,
    },
    "vllm.v1.worker.cpu_worker": {"CPUWorker": "def init_device()"},
    "vllm.v1.worker.cpu.shm": {},
    "vllm.v1.worker.cpu.model_runner": {"CPUModelRunner": "replaced\ndef warming_up_model()"},
    f"{GPU}.lora_utils": {
        "LoraState": "make_lora_inputs(req_ids, idx_mapping, num_scheduled_tokens)",
        "create_lora_capture_hook": "(lora_config, runner)",
    },
    f"{GPU}.dp_utils": {
        "DPSyncState": """
            (num_tokens_across_dp=_, uniform_token_count=_, eager=_, num_reqs=_)
            num_tokens_across_dp
        """,
    },
    f"{GPU}.model_runner": {
        "dispatch_cg_and_sync_dp": "(*args, dp_sync_state=_, **kwargs)",
        "GPUModelRunner": """
            def __init__(vllm_config, device)
            def load_model(*args, **kwargs)
            def initialize_kv_cache(kv_cache_config, *args, **kwargs)
            adaptive_verification, fast_prefill, pcp_manager
            aux_output_connector: AuxOutputWorkerConnector
            kv_connector: KVConnector
            pooling_runner, pp_handler, speculator, ubatch_runner
            def shutdown()
            def add_requests(scheduler_output)
            def execute_model(scheduler_output, *args, **kwargs)
            def sample_tokens(grammar_output)
            def sample(hidden_states, input_batch, grammar_output)
            def capture_model(profile_only=False)
            def profile_run(*args, **kwargs)
            finish_requests(scheduler_output)
            free_states(scheduler_output)
            update_requests(scheduler_output)
            get_model()
            rejection_sampler: RejectionSampler
            draft_tokens_handler, num_speculative_steps, use_aux_hidden_state_outputs
            maybe_setup_dummy_loras(lora_config)
            _set_active_loras(prompt_lora_mapping, token_lora_mapping, lora_requests)
            lora_config, lora_capture_cases
            lora_state: LoraState
            device, dtype, max_model_len, max_num_reqs, max_num_tokens, model, output_copy_stream
            model_config: ModelConfig
            uses_inputs_embeds, vocab_size
            model_state: DefaultModelState
            vllm_config: VllmConfig
            compilation_config: CompilationConfig
            parallel_config: ParallelConfig
            attn_groups: AttentionGroup
            block_tables: BlockTables
            cudagraph_manager: ModelCudaGraphManager
            input_buffers: InputBuffers
            kv_cache_config: KVCacheConfig
            req_states: gpu.states.RequestState
            sampler: gpu.sample.sampler.Sampler
            _dummy_run(num_tokens, uniform_decode=_)
            dp_rank, dp_size
            +stats, use_form, stock_steps_reason, graph_memory, reason, ranks, tables, windows
            +copy_stream, pace, masks, grammars, rounds
            structured_outputs_worker: StructuredOutputsWorker
        """,
    },
    f"{GPU}.structured_outputs": {
        "grammar_invalid_drafts": "(input_batch, grammar_req_ids, num_acceptable_drafts)",
        "StructuredOutputsWorker": """
            apply_grammar_bitmask(logits, input_batch, grammar_req_ids, grammar_bitmask)
        """,
    },
    f"{GPU}.kv_connector": {
        "ActiveKVConnector": "",
        "KVConnector": """
            pre_forward(scheduler_output)
            finish_forward()
            post_forward(finished_req_ids)
        """,
    },
    f"{GPU}.model_states.default": {
        "DefaultModelState": """
            dummy_inputs_embeds(num_tokens)
            prepare_attn(input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups,
                         kv_cache_config)
            num_new_sampled_tokens_per_step, supports_mm_inputs
            encoder_runner: EncoderRunner
            rope_state: RopeState
        """,
    },
    f"{GPU}.model_states.encoder_decoder": {"EncoderDecoderModelState": "encoder_cache"},
    f"{GPU}.model_states.mamba_hybrid": {
        "MambaHybridModelState": """
            _get_mamba_group_info(kv_cache_config)
            _mamba_ctx: MambaSpecDecodeGPUContext
            _mamba_state_idx_gpu
        """,
    },
    "vllm.v1.worker.mamba_utils": {
        "MambaSpecDecodeGPUContext": """
            run_fused_precopy(num_reqs, state_idx_gpu, src_col_gpu, token_bias_gpu, idx_mapping)
        """,
    },
    "vllm.v1.attention.backends.utils": {"NULL_BLOCK_ID": ""},
    "vllm.v1.kv_cache_interface": {"CrossAttentionSpec": "", "MambaSpec": ""},
    f"{GPU}.model_states.mm_pruning": {"MultiModalPruner": ""},
    f"{GPU}.model_states.prompt_embeds": {"PromptEmbedsState": ""},
    f"{GPU}.mm.encoder_runner": {
        "EncoderRunner": """
            get_inputs_embeds(input_ids, mm_embeds, is_mm_embed)
            is_realtime
        """,
    },
    f"{GPU}.mm.rope": {
        "RopeState": """
            positions
            prefill_delta: UvaBackedTensor
        """,
    },
    "vllm.model_executor.models.interfaces": {"requires_raw_input_tokens": "(model)"},
    f"{GPU}.attn_utils": {"build_slot_mappings_by_layer": "(slot_mappings, kv_cache_config)"},
    f"{GPU}.block_table": {
        "BlockTables": """
            (block_sizes=_, max_num_reqs=_, max_num_batched_tokens=_, max_num_blocks_per_group=_,
             device=_)
            append_block_ids(req_index, new_block_ids, overwrite=_)
            apply_staged_writes()
            compute_slot_mappings(idx_mapping, query_start_loc, positions, num_tokens_padded)
            gather_block_tables(idx_mapping, num_reqs_padded)
            block_sizes, input_block_tables, slot_mappings
            block_tables: StagedWriteTensor
            num_blocks: UvaBackedTensor
        """,
    },
    f"{GPU}.buffer_utils": {
        "StagedWriteTensor": "gpu",
        "UvaBackedTensor": "(size, dtype=_)\ncpu, np, gpu",
    },
    f"{GPU}.cudagraph_utils": {
        "ModelCudaGraphManager": """
            dispatch(num_reqs, num_tokens, uniform_token_count=_, num_active_loras=_,
             max_query_len=_) -> BatchExecutionDescriptor
            run_fullgraph(desc)
            run_pw_graph(model, model_inputs)
        """,
        "BatchExecutionDescriptor": "cg_mode, num_reqs, num_tokens, num_active_loras",
        "prepare_inputs_to_capture": """
            (num_reqs, num_tokens, model_state, input_buffers, block_tables, attn_groups,
             kv_cache_config, full_cudagraph=_, max_query_len=_)
        """,
    },
    f"{GPU}.input_batch": {
        "InputBatch": """
            make_dummy(num_reqs, num_tokens, input_buffers) -> InputBatch
            (req_ids=_, num_reqs=_, num_reqs_after_padding=_, idx_mapping=_, idx_mapping_np=_,
             expanded_idx_mapping=_, expanded_local_pos=_, num_scheduled_tokens=_, num_tokens=_,
             num_tokens_after_padding=_, num_draft_tokens=_, num_draft_tokens_per_req=_,
             query_start_loc=_, query_start_loc_np=_, seq_lens=_, seq_lens_cpu_upper_bound=_,
             dcp_local_seq_lens=_, num_computed_tokens_np=_, prefill_len_np=_,
             num_computed_prefill_tokens_np=_, is_prefilling_np=_, has_prefill=_,
             decode_graph_eligible=_, input_ids=_, positions=_, is_padding=_, logits_indices=_,
             cu_num_logits=_, cu_num_logits_np=_, has_structured_output_reqs=_, prompt_lens=_)
            cu_num_logits, idx_mapping, idx_mapping_np, logits_indices, num_reqs, positions
            query_start_loc, seq_lens, num_tokens, seq_lens_cpu_upper_bound, input_ids, is_padding
            num_tokens_after_padding, num_reqs_after_padding, expanded_local_pos
            num_draft_tokens, cu_num_logits_np
        """,
        "InputBuffers": """
            (max_num_reqs, max_num_tokens, device)
            input_ids, is_padding, positions, query_start_loc, seq_lens
        """,
        "post_update": """
            (idx_mapping, num_computed_tokens, last_sampled_tokens, output_bin_counts,
             sampled_tokens, num_sampled, num_rejected, query_start_loc, all_token_ids, total_len)
        """,
        "combine_sampled_and_draft_tokens": """
            (input_ids, idx_mapping, last_sampled_tokens, query_start_loc, seq_lens, prefill_len,
             draft_tokens, cu_num_logits, num_logits)
        """,
        "prepare_pos_seq_lens": """
            (idx_mapping, query_start_loc, num_computed_tokens, pos, seq_lens)
        """,
    },
    f"{GPU}.states": {
        "RequestState": """
            (max_num_reqs, max_model_len, max_num_batched_tokens, num_speculative_steps,
             vocab_size, device)
            add_request(req_id, prompt_len, all_token_ids, num_computed_tokens, max_tokens=_)
            apply_staged_writes()
            draft_tokens, free_indices, last_sampled_tokens, num_computed_tokens_np
            next_prefill_tokens
            req_id_to_index, index_to_req_id
            all_token_ids, num_computed_tokens, total_len: StagedWriteTensor
            prefill_len, prompt_len: UvaBackedTensor
        """,
    },
}

# Triton kernels that ``stock_kernels.py`` replaces on the CPU. Before the bar: the parameters that
# a stand-in takes, in their order, and the constants that it reads (``=_``). After it: what it
# does without.
KERNELS = {
    "input_batch._prepare_prefill_inputs_kernel": """
        input_ids_ptr, next_prefill_tokens_ptr, next_prefill_tokens_stride, num_lookahead,
        idx_mapping_ptr, query_start_loc_ptr, all_token_ids_ptr, all_token_ids_stride,
        prefill_lens_ptr, num_computed_tokens_ptr | BLOCK_SIZE, LOOKAHEAD_BLOCK
    """,
    "input_batch._prepare_pos_seq_lens_kernel": """
        pos_ptr, seq_lens_ptr, idx_mapping_ptr, query_start_loc_ptr, num_computed_tokens_ptr,
        max_num_reqs | BLOCK_SIZE
    """,
    "input_batch._combine_sampled_and_draft_tokens_kernel": """
        input_ids_ptr, idx_mapping_ptr, last_sampled_tokens_ptr, query_start_loc_ptr,
        seq_lens_ptr, prefill_len_ptr, draft_tokens_ptr, draft_tokens_stride, cu_num_logits_ptr,
        logits_indices_ptr, NUM_NEW_SAMPLED_TOKENS=_ | BLOCK_SIZE
    """,
    "input_batch._get_num_sampled_and_rejected_kernel": """
        num_sampled_ptr, num_rejected_ptr, seq_lens_ptr, cu_num_logits_ptr, idx_mapping_ptr,
        prefill_len_ptr
    """,
    # 0.33 can also move draft tokens, on other ranks than the last of a pipeline.
    "input_batch._post_update_kernel": """
        idx_mapping_ptr, num_computed_tokens_ptr, last_sampled_tokens_ptr, output_bin_counts_ptr,
        output_bin_counts_stride, sampled_tokens_ptr, sampled_tokens_stride, num_sampled_ptr,
        num_rejected_ptr, query_start_loc_ptr, all_token_ids_ptr, all_token_ids_stride,
        total_len_ptr | draft_tokens_ptr, draft_tokens_out_ptr, num_draft_tokens
    """,
    "input_batch._post_update_num_computed_tokens_kernel": """
        idx_mapping_ptr, num_computed_tokens_ptr, query_start_loc_ptr
    """,
    # 0.33 can also put the null block below a sliding window; 0.32 and the stand-in leave the ids.
    "block_table._gather_block_tables_kernel": """
        batch_idx_to_req_idx, src_block_table_ptrs, dst_block_table_ptrs, block_table_strides,
        num_blocks_ptr, num_blocks_stride, num_reqs | BLOCK_SIZE, num_computed_tokens_ptr,
        sliding_window_reach_ptr, block_sizes_ptr, MASK_SLIDING_WINDOW
    """,
    "block_table._compute_slot_mappings_kernel": """
        max_num_tokens, idx_mapping, query_start_loc, pos, block_table_ptrs, block_table_strides,
        block_sizes, slot_mapping_enabled, dcp_sharded, slot_mappings_ptr, slot_mappings_stride,
        cp_rank, CP_SIZE=_ | CP_INTERLEAVE, PAD_ID, TRITON_BLOCK_SIZE
    """,
    "buffer_utils._apply_write_kernel": """
        output_ptr, output_stride, write_indices_ptr, write_starts_ptr, write_contents_ptr,
        write_cu_lens_ptr, write_group_ids_ptr, MULTI_GROUP=_ | BLOCK_SIZE
    """,
    "sample.gumbel._temperature_kernel": """
        logits_ptr, logits_stride, expanded_idx_mapping_ptr, temperature_ptr, vocab_size |
        BLOCK_SIZE
    """,
    "sample.gumbel._gumbel_sample_kernel": """
        local_argmax_ptr, local_argmax_stride, local_max_ptr, local_max_stride, logits_cache_ptr,
        logits_cache_stride_0, logits_cache_stride_1, logits_cache_col_ptr,
        logits_cache_source_ptr, logits_cache_source_stride, logits_ptr, logits_stride,
        expanded_idx_mapping_ptr, seeds_ptr, pos_ptr, temp_ptr, vocab_size, BLOCK_SIZE=_,
        IS_DRAFTING=_, APPLY_TEMPERATURE=_, USE_FP64=_ | PER_TOKEN_COL
    """,
    "sample.penalties._penalties_kernel": """
        logits_ptr, logits_stride, expanded_idx_mapping_ptr, token_ids_ptr,
        expanded_local_pos_ptr, repetition_penalty_ptr, frequency_penalty_ptr,
        presence_penalty_ptr, prompt_bin_mask_ptr, prompt_bin_mask_stride, output_bin_counts_ptr,
        output_bin_counts_stride, vocab_size | BLOCK_SIZE
    """,
    "sample.penalties._bincount_kernel": """
        expanded_idx_mapping_ptr, all_token_ids_ptr, all_token_ids_stride, prompt_len_ptr,
        prefill_len_ptr, prompt_bin_mask_ptr, prompt_bin_mask_stride, output_bin_counts_ptr,
        output_bin_counts_stride | BLOCK_SIZE
    """,
    "sample.logit_bias._bias_kernel": """
        logits_ptr, logits_stride, vocab_size, expanded_idx_mapping_ptr,
        num_allowed_token_ids_ptr, allowed_token_ids_ptr, allowed_token_ids_stride,
        num_logit_bias_ptr, bias_token_ids_ptr, bias_token_ids_stride, bias_ptr, bias_stride,
        pos_ptr, min_lens_ptr, num_stop_token_ids_ptr, restore_when_all_masked_ptr,
        stop_token_ids_ptr, stop_token_ids_stride, CHECK_ALL_MASKED_ROWS=_ | BLOCK_SIZE,
        LOGITS_BLOCK_SIZE
    """,
    "sample.bad_words._bad_words_kernel": """
        logits_ptr, logits_stride, expanded_idx_mapping_ptr, bad_word_token_ids_ptr,
        bad_word_token_ids_stride, bad_word_offsets_ptr, bad_word_offsets_stride,
        num_bad_words_ptr, all_token_ids_ptr, all_token_ids_stride, prompt_len_ptr, total_len_ptr,
        input_ids_ptr, expanded_local_pos_ptr
    """,
    "sample.min_p._min_p_kernel": """
        logits_ptr, logits_stride, expanded_idx_mapping_ptr, min_p_ptr, vocab_size | BLOCK_SIZE
    """,
    "sample.logprob._topk_log_softmax_kernel": """
        output_ptr, logits_ptr, logits_stride, topk_ids_ptr, topk_ids_stride, topk, vocab_size |
        BLOCK_SIZE, TOPK_BLOCK_SIZE
    """,
    "sample.logprob._ranks_kernel": """
        output_ptr, logits_ptr, logits_stride, token_ids_ptr, vocab_size | BLOCK_SIZE
    """,
    "sample.logprob._fill_logprob_token_ids_kernel": """
        out_token_ids_ptr, out_token_ids_stride, out_valid_mask_ptr, out_valid_mask_stride,
        sampled_token_ids_ptr, topk_indices_ptr, topk_indices_stride, expanded_idx_mapping_ptr,
        num_per_req_token_ids_ptr, per_req_token_ids_ptr, per_req_token_ids_stride, NUM_TOPK=_ |
        PADDED_COLS
    """,
    "structured_outputs._apply_grammar_bitmask_kernel": """
        logits_ptr, logits_stride, logits_indices_ptr, cu_num_logits_ptr, bitmask_ptr,
        bitmask_stride, vocab_size, MASK_STRIDE=_ | BLOCK_SIZE
    """,
}
# The same by their whole names.
STATE_KERNELS = {
    "vllm.v1.worker.utils._zero_kv_blocks_kernel": """
        seg_addrs_ptr, seg_block_strides_ptr, seg_page_sizes_ptr, block_ids_ptr | BLOCK_SIZE
    """,
    "vllm.v1.worker.mamba_utils.preprocess_mamba_align_fused_kernel": """
        idx_mapping_ptr, state_idx_ptr, num_computed_tokens_ptr, query_start_loc_ptr,
        num_accepted_tokens_ptr, src_col_ptr, src_off_ptr, num_reqs, MAMBA_BLOCK_SIZE=_ |
        BLOCK_SIZE
    """,
    "vllm.v1.worker.mamba_utils.precopy_mamba_align_fused_kernel": """
        mamba_state_idx_ptr, src_col_ptr, token_bias_ptr, block_table_ptrs_ptr,
        block_table_stride_req, state_base_addrs_ptr, state_block_strides_ptr,
        state_elem_sizes_ptr, state_inner_sizes_ptr, state_conv_widths_ptr,
        state_group_indices_ptr, state_dim_row_count_ptr, state_dim_row_stride_ptr,
        idx_mapping_ptr, num_reqs, CONV_STATE_DIM_FIRST=_, HAS_IDX_MAPPING=_ | COPY_BLOCK_SIZE,
        TEMPORAL_TILES
    """,
    "vllm.v1.worker.mamba_utils.postprocess_mamba_fused_kernel": """
        num_accepted_tokens_ptr, mamba_state_idx_ptr, num_scheduled_tokens_ptr,
        num_computed_tokens_ptr, num_draft_tokens_ptr, block_table_ptrs_ptr,
        block_table_stride_req, state_base_addrs_ptr, state_block_strides_ptr,
        state_elem_sizes_ptr, state_inner_sizes_ptr, state_conv_widths_ptr,
        state_group_indices_ptr, state_dim_row_count_ptr, state_dim_row_stride_ptr,
        num_accepted_tokens_out_ptr, idx_mapping_ptr, num_reqs, block_size=_,
        CONV_STATE_DIM_FIRST=_, HAS_IDX_MAPPING=_, PRECOMPUTED_NEW_COMPUTED=_ | COPY_BLOCK_SIZE,
        TEMPORAL_TILES
    """,
    "vllm.v1.worker.gpu.model_states.mamba_hybrid._scatter_num_accepted_kernel": """
        idx_mapping_ptr, num_sampled_ptr, num_accepted_ptr |
    """,
    "vllm.v1.worker.gpu.model_states.mamba_hybrid._fill_num_accepted_kernel": """
        idx_mapping_ptr, num_accepted_ptr, num_sampled |
    """,
}
