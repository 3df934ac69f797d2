"""The part of ``vllm_names.py``'s list that is speculative decoding."""

from __future__ import annotations

SPECULATION = {
    "vllm.v1.worker.gpu.spec_decode.eagle.speculator": {"EagleSpeculator": ""},
    "vllm.v1.worker.gpu.spec_decode.mtp.speculator": {"MTPSpeculator": "share_mtp_topk_indices"},
    "vllm.v1.worker.gpu.spec_decode.ngram.speculator": {"NgramGPUSpeculator": ""},
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils": {
        "_resample_kernel": "",
        "rejection_sample": """
            (target_logits, draft_logits, draft_sampled, cu_num_logits, pos, idx_mapping,
             expanded_idx_mapping, expanded_local_pos, temperature, seed, num_speculative_steps,
             synthetic_conditional_rates, use_fp64=_, use_block_verification=_)
        """,
    },
    "vllm.v1.worker.gpu.sample.gumbel": {
        "apply_temperature": "(logits, expanded_idx_mapping, temperature)"
    },
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler": {
        "gather_draft_sampled": """
            (input_ids, positions, logits_indices, expanded_idx_mapping, expanded_local_pos,
             prefill_len)
        """,
        "RejectionSampler": """
            __call__(logits, input_batch, draft_logits, invalid_drafts)
            synthetic_conditional_rates, use_block_verification, sampler
        """,
    },
    "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator": {
        "StandaloneARSpeculator": """
            _copy_request_inputs(num_reqs, idx_mapping, temperature, seeds)
            sample_draft(hidden_states, sample_src_positions, idx_mapping, temperature, seeds,
                         draft_step, draft_logits)
            attn_groups, draft_tokens, idx_mapping, draft_max_seq_len, draft_is_prefilling
            draft_logits, current_draft_step, temperature, seeds, model
        """
    },
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator": {
        "prepare_prefill_inputs": """
            (last_token_indices, current_draft_step, input_buffers, input_batch, num_sampled,
             num_rejected, last_sampled, next_prefill_tokens, max_num_reqs)
        """,
        "prepare_decode_inputs": """
            (draft_tokens, target_seq_lens, num_rejected, input_buffers, sample_src_positions,
             max_model_len, max_num_reqs)
        """,
        "TargetDependentARSpeculator": """
            _copy_request_inputs(num_reqs, idx_mapping, temperature, seeds)
            _prefill(num_reqs, num_tokens, attn_metadata, slot_mappings, num_tokens_across_dp)
            _generate_fused_drafts(num_reqs, num_tokens_padded, attn_metadata, slot_mappings,
                                   num_tokens_across_dp, cudagraph_runtime_mode,
                                   num_speculative_steps)
            attn_groups, block_tables, kv_cache_config, model_state, input_buffers, model
            last_token_indices, current_draft_step, hidden_states, draft_tokens
            sample_src_positions, max_model_len, max_num_reqs
            supports_decode_metadata_update, supports_mm_inputs, dcp_size, eplb_state
            pcp_manager, acceptance_estimator, draft_watermarker
        """,
    },
    "vllm.v1.worker.gpu.spec_decode.utils": {
        "get_drafter_hidden_states": "(model, hidden_states)",
    },
}
