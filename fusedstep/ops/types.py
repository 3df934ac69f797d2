"""What the step operations read and write: plain tensors with static addresses.

Two index spaces: ``req_state_idx`` is a request's permanent row in the device state, ``batch_idx``
its place in this window's batch. ``R`` is max_num_reqs, ``V`` the vocabulary size, ``B`` the batch.
Each class says who writes it; nobody else does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A row that stopped writes its key and value nowhere.
PAD_SLOT_ID = -1
# More than a batch has rows: one such stop leaves no row to go on for.
WINDOW_ENDS = 1 << 16


@dataclass(frozen=True)
class RequestState:
    """Progress of every request, row = req_state_idx.

    Written by the runner when a request enters its row and by prefill steps, and by ``step``
    inside a window.
    """

    last_sampled_tokens: torch.Tensor  # [R, 1] int64
    num_computed_tokens: torch.Tensor  # [R] int32
    total_len: torch.Tensor  # [R] int32, prompt plus output tokens
    prompt_len: torch.Tensor  # [R] int32
    all_token_ids: torch.Tensor  # [R, max_model_len] int32
    prompt_bin_mask: torch.Tensor  # [R, ceil(V / 32)] int32, one bit per token id
    output_bin_counts: torch.Tensor  # [R, V] int32
    stopped: torch.Tensor  # [R] bool, set by ``step``, cleared when a request enters the row


@dataclass(frozen=True)
class SamplingState:
    """Sampling parameters of every request, row = req_state_idx. Written by the runner.

    Names, shapes and meaning are those of vLLM's model runner V2 (``v1/worker/gpu/sample``).
    """

    temperature: torch.Tensor  # [R] float32, 0 = greedy
    seeds: torch.Tensor  # [R] int64
    top_k: torch.Tensor  # [R] int32, V = off
    top_p: torch.Tensor  # [R] float32, 1 = off
    min_p: torch.Tensor  # [R] float32, 0 = off
    repetition_penalty: torch.Tensor  # [R] float32, 1 = off
    frequency_penalty: torch.Tensor  # [R] float32, 0 = off
    presence_penalty: torch.Tensor  # [R] float32, 0 = off
    num_allowed_token_ids: torch.Tensor  # [R] int32, 0 = all allowed
    allowed_token_ids: torch.Tensor  # [R, 1024] int32
    num_logit_bias: torch.Tensor  # [R] int32
    logit_bias_token_ids: torch.Tensor  # [R, 1024] int32
    logit_bias: torch.Tensor  # [R, 1024] float32
    min_lens: torch.Tensor  # [R] int32, prompt_len + min_tokens
    num_min_stop_token_ids: torch.Tensor  # [R] int32, ids masked while shorter than min_lens
    min_stop_token_ids: torch.Tensor  # [R, 128] int32
    num_bad_words: torch.Tensor  # [R] int32
    bad_word_token_ids: torch.Tensor  # [R, max_total_bad_word_tokens] int32, flattened
    bad_word_offsets: torch.Tensor  # [R, max_num_bad_words + 1] int32


@dataclass(frozen=True)
class StopState:
    """Stop rule of every request, row = req_state_idx. Written by the runner.

    The rule is vLLM's ``check_stop``: the sampled token is in ``stop_token_ids`` (the EOS id is
    one of them unless ignore_eos), or ``total_len`` has reached ``max_len``.
    """

    max_len: torch.Tensor  # [R] int32, min(prompt_len + max_tokens, max_model_len)
    num_stop_token_ids: torch.Tensor  # [R] int32
    stop_token_ids: torch.Tensor  # [R, MAX_STOP_TOKEN_IDS] int32


@dataclass(frozen=True)
class StepInputs:
    """What the model and the attention read in the next step, by batch_idx.

    Written by ``prepare`` for a window's first step and by ``step`` for the others. An inactive row
    writes its key and value to no slot (PAD_SLOT_ID); a padding row has position and length 0.
    """

    input_ids: torch.Tensor  # [max_num_tokens] int32
    positions: torch.Tensor  # [max_num_tokens] int64
    seq_lens: torch.Tensor  # [R] int32
    slot_mappings: torch.Tensor  # [num_kv_cache_groups, max_num_tokens] int64
    input_block_tables: tuple[torch.Tensor, ...]  # per group [R, max_num_blocks] int32
    block_sizes: tuple[int, ...]  # per group, tokens


@dataclass(frozen=True)
class WindowRows:
    """One window's batch, by batch_idx. ``idx_mapping``, ``budget`` and ``stop_weight`` are staged
    by the host, the rest is written by ``prepare`` and ``step``."""

    idx_mapping: torch.Tensor  # [B] int64, batch_idx -> req_state_idx, -1 for a padding row
    budget: torch.Tensor  # [B] int32, steps this row may take (its reserved KV slots)
    active: torch.Tensor  # [B] bool
    sampled: torch.Tensor  # [B] int64, this step's token of each active row
    logprobs: torch.Tensor  # [B] float32, its log softmax in the raw logits, when asked
    ranks: torch.Tensor  # [B] int64, how many raw logits are at least its own, when asked
    num_sampled: torch.Tensor  # [B] int32, tokens emitted in this window
    out_tokens: torch.Tensor  # [max_num_steps, B] int64, [step, batch_idx]
    stop_weight: torch.Tensor  # [1] int32, staged: 1, or WINDOW_ENDS to end at the first stop
    num_active: torch.Tensor  # [1] int32, less the weight of each stop: the window ends at <= 0


@dataclass(frozen=True)
class BatchNeeds:
    """What the rows of a batch may ask of a step; the host knows it when it stages the window.

    A kernel leaves out what nobody asks for. Too much costs time, too little gives wrong tokens.
    """

    adjustment: bool = True  # bias, allowed ids, min_tokens, penalties or bad words
    min_p: bool = True  # at a temperature above 0
    truncation: bool = True  # top-k or top-p at a temperature above 0
    logprobs: bool = False  # logprob and rank of the sampled tokens
