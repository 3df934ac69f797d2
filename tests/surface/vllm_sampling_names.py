"""The part of ``vllm_names.py``'s list that is Model Runner V2's sampler."""

from __future__ import annotations

from surface.vllm_runner_names import GPU

SAMPLING = {
    f"{GPU}.sample.sampler": {
        "Sampler": """
            (vllm_config, max_num_reqs, vocab_size, device, req_states)
            __call__(logits, input_batch) -> gpu.sample.output.SamplerOutput
            add_request(req_idx, sampling_params)
            apply_staged_writes()
            apply_sampling_params(logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos,
                                  input_ids, expanded_local_pos, seq_lens_upper_bound_np)
            get_logprobs_dims(idx_mapping_np)
            use_flashinfer, logprobs_mode, logprob_token_ids_state, compute_nans
            thinking_budget_state: ThinkingBudgetState
            logits_processors: (LogitBiasState, PenaltiesState, BadWordsState)
            penalties_state: PenaltiesState
            sampling_states: SamplingStates
        """,
    },
    f"{GPU}.sample.states": {
        "SamplingStates": """
            vocab_size
            min_p, seeds, temperature, top_k, top_p: UvaBackedTensor
        """,
    },
    f"{GPU}.sample.logit_bias": {
        "MAX_NUM_ALLOWED_TOKEN_IDS": "",
        "MAX_NUM_LOGIT_BIAS_TOKENS": "",
        "MAX_NUM_STOP_TOKEN_IDS": "",
        "apply_logit_bias": """
            (logits, expanded_idx_mapping, pos, num_allowed_token_ids, allowed_token_ids,
             num_logit_bias, logit_bias_token_ids, logit_bias, min_lens, num_stop_token_ids,
             restore_when_all_masked, stop_token_ids)
        """,
        "LogitBiasState": """
            use_logit_bias
            min_lens, num_allowed_token_ids, num_logit_bias, num_stop_token_ids: UvaBackedTensor
            allowed_token_ids, logit_bias, logit_bias_token_ids, stop_token_ids: StagedWriteTensor
        """,
    },
    f"{GPU}.sample.penalties": {
        "apply_penalties": """
            (logits, expanded_idx_mapping, token_ids, expanded_local_pos, repetition_penalty,
             frequency_penalty, presence_penalty, prompt_bin_mask, output_bin_counts)
        """,
        "PenaltiesState": """
            output_bin_counts, prompt_bin_mask, use_penalty
            frequency_penalty, presence_penalty, repetition_penalty: UvaBackedTensor
        """,
    },
    f"{GPU}.sample.bad_words": {
        "apply_bad_words": """
            (logits, expanded_idx_mapping, bad_word_token_ids, bad_word_offsets, num_bad_words,
             all_token_ids, prompt_len, total_len, input_ids, expanded_local_pos,
             max_num_bad_words)
        """,
        "BadWordsState": """
            num_bad_words: UvaBackedTensor
            bad_word_offsets, bad_word_token_ids: StagedWriteTensor
        """,
    },
    f"{GPU}.sample.logprob": {
        "compute_topk_scores": """
            (logits, num_logprobs, sampled_token_ids, logprob_token_ids_state=_,
             expanded_idx_mapping=_, max_per_req_token_ids=_, logits_mode=_) -> LogprobsTensors
        """,
    },
    f"{GPU}.sample.thinking_budget": {
        "ThinkingBudgetState": "enabled, use_thinking_budget",
    },
    f"{GPU}.sample.output": {
        "SamplerOutput": """
            (sampled_token_ids=_, logprobs_tensors=_, num_nans=_, num_sampled=_, num_rejected=_)
            num_rejected, num_sampled, sampled_token_ids
            logprobs_tensors: LogprobsTensors
        """,
    },
    "vllm.v1.sample.logits_processor": {
        "BatchUpdate": "(batch_size, removed=_, added=_, moved=_)",
        "LogitsProcessors": "(logitsprocs)",
        "MinPLogitsProcessor": "(vllm_config, device, is_pin_memory)\nupdate_state(batch_update)",
    },
    "vllm.v1.sample.metadata": {
        "SamplingMetadata": """
            (temperature=_, all_greedy=_, all_random=_, top_p=_, top_k=_, generators=_,
             max_num_logprobs=_, no_penalties=_, prompt_token_ids=_, frequency_penalties=_,
             presence_penalties=_, repetition_penalties=_, output_token_ids=_,
             allowed_token_ids_mask=_, bad_words_token_ids=_, logitsprocs=_)
            all_greedy, output_token_ids
        """,
    },
    "vllm.v1.sample.sampler": {
        "Sampler": """
            ()
            (logprobs_mode)
            __call__(logits, sampling_metadata)
            apply_logits_processors(logits, sampling_metadata, predict_bonus_token=_)
            sample(logits, sampling_metadata)
        """,
    },
}
