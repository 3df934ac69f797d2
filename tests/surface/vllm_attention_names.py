"""The part of ``vllm_names.py``'s list that the attention backend needs."""

from __future__ import annotations

ATTENTION = {
    "vllm.config": {
        "CompilationMode": "NONE",
        "VllmConfig": "compilation_config: CompilationConfig",
        "get_current_vllm_config": "()",
    },
    "vllm.config.attention": {
        "AttentionConfig": "()\nflash_attn_max_num_splits_for_cuda_graph",
    },
    "vllm.config.compilation": {
        "CompilationConfig": "static_forward_context, cudagraph_capture_sizes",
    },
    "vllm.model_executor.layers.rotary_embedding.base": {"RotaryEmbedding": "forward_cpu"},
    "vllm.platforms.cpu": {
        "CpuPlatform": """
            def get_attn_backend_cls(selected_backend, attn_selector_config, num_heads=None)
        """,
    },
    "vllm.v1.attention.backend": {
        "AttentionType": "DECODER",
        "CommonAttentionMetadata": "causal, max_query_len, num_actual_tokens, num_reqs",
    },
    "vllm.v1.attention.backends.fa_utils": {
        "get_flash_attn_version": "(head_size=_)",
    },
    "vllm._custom_ops": {
        "reshape_and_cache_flash": """
            (key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale)
        """,
    },
    "vllm.vllm_flash_attn.flash_attn_interface": {
        "get_scheduler_metadata": """
            (batch_size=_, num_heads_q=_, num_heads_kv=_, headdim=_, cache_seqlens=_, qkv_dtype=_,
             cu_seqlens_q=_, page_size=_, num_splits=_, **common)
        """,
        "flash_attn_varlen_func": """
            (q=_, k=_, v=_, out=_, cu_seqlens_q=_, seqused_k=_, softmax_scale=_, block_table=_,
             scheduler_metadata=_, fa_version=_, num_splits=_, **common)
        """,
    },
    "vllm.v1.attention.backends.registry": {
        "AttentionBackendEnum": "CUSTOM",
        "register_backend": "(backend, class_path)",
    },
    "vllm.v1.attention.backends.triton_attn": {
        "TritonAttentionBackend": """
            def get_name()
            def get_impl_cls()
            def get_builder_cls()
            def supports_attn_type(attn_type)
            def supports_batch_invariance()
            supported_kv_cache_dtypes, forward_includes_kv_cache_update
        """,
        "MIN_LAUNCH_GRID_SIZE_2D": "",
        "NUM_PAR_SOFTMAX_SEGMENTS": "",
        "TritonAttentionImpl": """
            (num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
             kv_cache_dtype)
            forward(layer, query, key, value, kv_cache, attn_metadata, output)
            do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            def __init__(*args, **kwargs)
            def forward(layer, query, key, value, kv_cache, attn_metadata, output,
             output_scale=None, output_block_scale=None)
            def do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            def fused_output_quant_supported(quant_key)
            def fused_rope_kvcache_supported()
            num_heads, num_kv_heads, head_size, scale, sliding_window, logits_soft_cap
            alibi_slopes, sinks, fp8_dtype, kv_cache_dtype, kv_sharing_target_layer_name
            use_alibi_sqrt, chunk_lookback, supports_quant_query_input, _is_per_token_head_quant
        """,
        "TritonAttentionMetadata": """
            (num_actual_tokens=_, max_query_len=_, query_start_loc=_, max_seq_len=_, seq_lens=_,
             block_table=_, slot_mapping=_, seq_threshold_3D=_, num_par_softmax_segments=_,
             softmax_segm_output=_, softmax_segm_max=_, softmax_segm_expsum=_, causal=_)
            block_table, mm_prefix_range_tensor, query_start_loc, rswa_prefix_lens, seq_lens
            slot_mapping
        """,
        "TritonAttentionMetadataBuilder": """
            def __init__(kv_cache_spec, layer_names, vllm_config, device)
            def build(common_prefix_len, common_attn_metadata, fast_build=False)
        """,
    },
}
