"""Native stand-ins for the Triton kernels of vLLM's Model Runner V2, for the CPU.

Outside a window (prefills, batches that fall back) the runner is the stock one and launches these
kernels; without a GPU they would run in Triton's interpreter, 1 to 100 ms each. ``register`` puts
numba code in their place through vLLM's own dispatcher. A stand-in takes its kernel's arguments in
their order, but not the launch grid: the number of programs follows from the tensors' shapes.
Context parallelism and float64 noise are not covered: they trip an assertion.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fusedstep.ops import native_sample
from fusedstep.ops.native import flat_logits
from fusedstep.vllm_plugin.cpu import draft_kernels, state_kernels
from fusedstep.vllm_plugin.cpu import native_kernels as native_stock

StandIn = Callable[..., None]

_WORKER = "vllm.v1.worker."
_DRAFT_SALT = 1 << 30  # moves the positions of a draft's noise (``sample/gumbel.py``)
_registered = False


def register() -> None:
    """Replace the stock kernels. Imports vLLM's runner; a second call does nothing."""
    global _registered
    if _registered:
        return
    from vllm.triton_utils.dispatcher import register_kernels

    draft_kernels.keep_stock()
    register_kernels(_stand_ins())
    _registered = True


def _stand_ins() -> dict[str, StandIn]:
    names: dict[str, StandIn] = {
        "input_batch._prepare_prefill_inputs_kernel": _plain(native_stock.prepare_prefill_inputs),
        "input_batch._prepare_pos_seq_lens_kernel": _plain(native_stock.prepare_pos_seq_lens),
        "input_batch._combine_sampled_and_draft_tokens_kernel": combine_sampled_and_draft_tokens,
        "input_batch._get_num_sampled_and_rejected_kernel": _plain(
            native_stock.get_num_sampled_and_rejected
        ),
        "input_batch._post_update_kernel": _plain(native_stock.post_update),
        "input_batch._post_update_num_computed_tokens_kernel": _plain(
            native_stock.post_update_num_computed_tokens
        ),
        "block_table._gather_block_tables_kernel": _plain(native_stock.gather_block_tables),
        "block_table._compute_slot_mappings_kernel": compute_slot_mappings,
        "buffer_utils._apply_write_kernel": apply_write,
        "mm.rope._prepare_rope_positions_kernel": _plain(native_stock.prepare_rope_positions),
        "sample.gumbel._temperature_kernel": temperature,
        "sample.gumbel._gumbel_sample_kernel": gumbel_sample,
        "sample.penalties._penalties_kernel": penalties,
        "sample.penalties._bincount_kernel": _plain(native_stock.bincount),
        "sample.logit_bias._bias_kernel": bias,
        "sample.bad_words._bad_words_kernel": bad_words,
        "sample.min_p._min_p_kernel": min_p,
        "sample.logprob._topk_log_softmax_kernel": topk_log_softmax,
        "sample.logprob._ranks_kernel": ranks,
        "sample.logprob._fill_logprob_token_ids_kernel": fill_logprob_token_ids,
        "sample.thinking_budget._update_committed_marker_cache_kernel": _plain(
            native_stock.update_committed_marker_cache
        ),
        "sample.thinking_budget._thinking_budget_kernel": _plain(native_stock.thinking_budget),
        "structured_outputs._apply_grammar_bitmask_kernel": apply_grammar_bitmask,
        "spec_decode.ngram.speculator._ngram_scan_kernel": ngram_scan,
        "spec_decode.ngram.speculator._ngram_finalize_kernel": ngram_finalize,
    }
    names |= draft_kernels.STAND_INS
    names = {f"gpu.{name}": stand_in for name, stand_in in names.items()} | state_kernels.STAND_INS
    return {_WORKER + name: stand_in for name, stand_in in names.items()}


def _arrays(*args: Any) -> list[Any]:
    return [arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in args]


def _plain(kernel: Callable[..., None]) -> StandIn:
    """``kernel`` on tensors; its parameters are the stock kernel's up to the constants."""
    num_args = len(inspect.signature(kernel).parameters)

    def stand_in(*args: Any, **_constants: Any) -> None:
        kernel(*_arrays(*args[:num_args]))

    return stand_in


def combine_sampled_and_draft_tokens(
    *args: Any, NUM_NEW_SAMPLED_TOKENS: int = 1, **_constants: Any
) -> None:
    """``_combine_sampled_and_draft_tokens_kernel``."""
    native_stock.combine_sampled_and_draft_tokens(*_arrays(*args[:10]), NUM_NEW_SAMPLED_TOKENS)


def compute_slot_mappings(*args: Any, CP_SIZE: int, **_constants: Any) -> None:
    """``_compute_slot_mappings_kernel`` without context parallelism."""
    assert CP_SIZE == 1, "context parallelism needs a GPU"
    _, idx_mapping, query_start_loc, positions, tables, strides, block_sizes, enabled = args[:8]
    slot_mappings = args[9]
    native_stock.map_slots(
        *_arrays(idx_mapping, query_start_loc, positions, tables, strides),
        *_arrays(block_sizes, enabled, slot_mappings),
    )


def apply_grammar_bitmask(
    logits: torch.Tensor,  # [num_logits, V]
    _logits_stride: int,
    mapping: torch.Tensor,  # [num_masks], request * MASK_STRIDE + position
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    bitmask: torch.Tensor,  # [num_masks, ceil(V / 32)] int32, one bit per allowed token id
    _bitmask_stride: int,
    vocab_size: int,
    *,
    MASK_STRIDE: int,
    **_constants: Any,
) -> None:
    """``_apply_grammar_bitmask_kernel``: tokens that a grammar forbids get -inf."""
    allowed = np.unpackbits(bitmask.numpy().view(np.uint8), axis=1, bitorder="little")
    for row, packed in zip(allowed[:, :vocab_size], mapping.tolist(), strict=True):
        request, position = divmod(packed, MASK_STRIDE)
        logits_idx = int(cu_num_logits[request]) + position
        if logits_idx < int(cu_num_logits[request + 1]):
            logits[logits_idx].masked_fill_(torch.from_numpy(row == 0), -torch.inf)


def ngram_scan(*args: Any, **_constants: Any) -> None:
    """``_ngram_scan_kernel``: finds the longest suffix of the tokens that also occurs earlier, and
    the last position where it does.

    It is the score ``n * (max_model_len + 1) + position + 1``, here in the first column.
    """
    token_ids, _, idx_mapping, total_lens, num_sampled, scores, _, max_model_len = _arrays(
        *args[:8]
    )
    min_n, max_n = args[8:10]
    scores[: len(idx_mapping)] = 0
    for i, req in enumerate(idx_mapping):
        tokens = token_ids[req, : total_lens[req]]
        if num_sampled[i] <= 0:
            continue
        for n in range(min(max_n, len(tokens) - 1), min_n - 1, -1):
            before = np.lib.stride_tricks.sliding_window_view(tokens[:-1], n)
            starts = np.flatnonzero((before == tokens[-n:]).all(axis=1))
            if len(starts):
                scores[i, 0] = n * (max_model_len + 1) + starts[-1] + 1
                break


def ngram_finalize(*args: Any, **_constants: Any) -> None:
    """``_ngram_finalize_kernel``: the tokens after that position; without one, the last."""
    token_ids, _, idx_mapping, total_lens, num_sampled, last_sampled = _arrays(*args[:6])
    scores, _, drafts, max_model_len, _, num_drafts = _arrays(*args[6:12])
    for i, req in enumerate(idx_mapping):
        drafts[i] = last_sampled[req]
        if num_sampled[i] > 0 and scores[i].max() > 0:
            n, position = divmod(int(scores[i].max()) - 1, max_model_len + 1)
            after = token_ids[req, position + n : total_lens[req]][:num_drafts]
            drafts[i, : len(after)] = after


def apply_write(
    target: torch.Tensor,
    stride: Any,
    indices: torch.Tensor,
    starts: torch.Tensor,
    contents: torch.Tensor,
    cu_lens: torch.Tensor,
    group_ids: torch.Tensor | None,
    *,
    MULTI_GROUP: bool,
    **_constants: Any,
) -> None:
    """``_apply_write_kernel``: into one tensor, or by address into those of several groups."""
    pieces = _arrays(indices, starts, contents, cu_lens)
    if MULTI_GROUP:
        native_stock.write_groups(*_arrays(target, stride), *pieces, *_arrays(group_ids))
    else:
        native_stock.write_rows(target.view(-1).numpy(), stride, *pieces)


def temperature(
    logits: torch.Tensor,  # [n, V] float32, changed in place
    _stride: int,
    idx_mapping: torch.Tensor,  # [n]
    temperatures: torch.Tensor,  # [max_num_reqs] float32
    *_: Any,
    **_constants: Any,
) -> None:
    """``_temperature_kernel``."""
    for row, value in zip(logits.numpy(), temperatures[idx_mapping].numpy(), strict=True):
        if value not in (0, 1):
            native_sample.apply_temperature(row, value)


def min_p(
    logits: torch.Tensor,  # [n, V] float32, changed in place
    _stride: int,
    idx_mapping: torch.Tensor,  # [n]
    min_ps: torch.Tensor,  # [max_num_reqs] float32
    *_: Any,
    **_constants: Any,
) -> None:
    """``_min_p_kernel``."""
    for row, value in zip(logits.numpy(), min_ps[idx_mapping].numpy(), strict=True):
        if value != 0:
            native_sample.apply_min_p(row, value)


def gumbel_sample(
    *args: Any,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    **_constants: Any,
) -> None:
    """``_gumbel_sample_kernel``, float32 noise.

    Of a row's block maxima only the winner's is filled in, the others are -inf: the caller takes
    their argmax and nothing else.
    """
    local_argmax, local_max, logits_cache, logits = args[0], args[2], args[4], args[10]
    assert not USE_FP64, "fp64 noise needs a GPU"
    if logits_cache is not None:  # a draft model's: what its tokens are held against
        columns, source, requests = args[7], args[8], args[12].long()
        known = requests >= 0
        columns = columns.expand(len(requests)).long()
        logits_cache[requests[known], columns[known], : source.shape[1]] = source[known]
    idx_mapping, seeds, positions, temperatures, vocab_size = _arrays(*args[12:17])
    flat, row_stride = flat_logits(logits), logits.stride(0)
    row, bounds = np.empty(vocab_size, np.float32), np.empty(native_sample.BLOCK, np.float32)
    local_max.fill_(-torch.inf)
    local_argmax.zero_()
    for i, req in enumerate(idx_mapping):
        token = native_sample.sample_noisy(
            flat[i * row_stride : i * row_stride + vocab_size],
            temperatures[req] if req >= 0 else np.float32(0),
            APPLY_TEMPERATURE,
            seeds[req],
            positions[i] + _DRAFT_SALT * IS_DRAFTING,
            row,
            bounds,
        )
        local_max[i, token // BLOCK_SIZE] = 0
        local_argmax[i, token // BLOCK_SIZE] = token


def penalties(*args: Any, **_constants: Any) -> None:
    """``_penalties_kernel``; draft tokens before a logit count as output."""
    logits, _, idx_mapping, token_ids, local_positions = _arrays(*args[:5])
    repetition, frequency, presence = _arrays(*args[5:8])
    prompt_mask, _, output_counts = _arrays(*args[8:11])
    for i, req in enumerate(idx_mapping):
        strengths = repetition[req], frequency[req], presence[req]
        if strengths == (1, 0, 0):
            continue
        counts = output_counts[req]
        drafts = _drafts(token_ids, i, local_positions[i])
        if len(drafts):
            counts = counts.copy()
            np.add.at(counts, drafts, 1)
        native_sample.apply_penalties(logits[i], prompt_mask[req], counts, *strengths)


def bad_words(*args: Any, **_constants: Any) -> None:
    """``_bad_words_kernel``; draft tokens before a logit count as output."""
    logits, _, idx_mapping, word_token_ids, _, offsets, _, num_words = _arrays(*args[:8])
    all_token_ids, _, prompt_lens, total_lens, token_ids, local_positions = _arrays(*args[8:14])
    for i, req in enumerate(idx_mapping):
        if num_words[req] == 0:
            continue
        output_ids = all_token_ids[req, prompt_lens[req] : total_lens[req]]
        drafts = _drafts(token_ids, i, local_positions[i])
        if len(drafts):
            output_ids = np.concatenate((output_ids, drafts))
        words = word_token_ids[req], offsets[req, : num_words[req] + 1]
        native_sample.forbid_bad_words(logits[i], *words, output_ids)


def _drafts(token_ids: npt.NDArray[Any], logit_idx: int, num_drafts: int) -> npt.NDArray[Any]:
    """The draft tokens that precede a logit: the request's input tokens but its first."""
    return token_ids[logit_idx - num_drafts + 1 : logit_idx + 1]


def bias(*args: Any, CHECK_ALL_MASKED_ROWS: bool, **_constants: Any) -> None:
    """``_bias_kernel``: allowed token ids, logit bias, no stop token before min_tokens."""
    logits, _, _, idx_mapping, num_allowed, allowed, _, num_bias = _arrays(*args[:8])
    bias_token_ids, _, biases, _, positions, min_lens = _arrays(*args[8:14])
    num_stop, restore, stop_token_ids = _arrays(*args[14:17])
    for i, req in enumerate(idx_mapping):
        row = logits[i]
        if num_allowed[req]:
            token_ids = allowed[req, : num_allowed[req]]
            native_sample.keep_allowed(row, token_ids, np.empty(len(token_ids), np.float32))
        if num_bias[req]:
            native_sample.add_bias(row, bias_token_ids[req, : num_bias[req]], biases[req])
        if num_stop[req] and positions[i] + 1 < min_lens[req]:
            stop = stop_token_ids[req, : num_stop[req]]
            before = row[stop]
            row[stop] = -np.inf
            if CHECK_ALL_MASKED_ROWS and restore[req] and row.max() == -np.inf:
                finite = np.isfinite(before)
                row[stop[finite]] = before[finite]


def topk_log_softmax(
    output: torch.Tensor,  # [n, m] float32
    logits: torch.Tensor,  # [n, V]
    _stride: int,
    token_ids: torch.Tensor,  # [n, m] int64
    *_: Any,
    **_constants: Any,
) -> None:
    """``_topk_log_softmax_kernel``."""
    row, weights = np.empty((2, logits.shape[1]), np.float32)
    for raw, ids, out in zip(_rows(logits), *_arrays(token_ids, output), strict=True):
        native_sample.row_logprobs(raw, ids, row, weights, out)


def ranks(
    output: torch.Tensor,  # [n] int64
    logits: torch.Tensor,  # [n, V]
    _stride: int,
    token_ids: torch.Tensor,  # [n] int64
    *_: Any,
    **_constants: Any,
) -> None:
    """``_ranks_kernel``."""
    for i, (raw, token) in enumerate(zip(_rows(logits), token_ids.numpy(), strict=True)):
        output[i] = native_sample.row_rank(raw, token)


def _rows(logits: torch.Tensor) -> list[npt.NDArray[Any]]:
    flat, stride = flat_logits(logits), logits.stride(0)
    return [flat[i * stride : i * stride + logits.shape[1]] for i in range(len(logits))]


def fill_logprob_token_ids(
    out_token_ids: torch.Tensor,  # [n, 1 + num_cols] int64
    _out_stride: int,
    out_valid: torch.Tensor,  # [n, 1 + num_cols] bool
    _valid_stride: int,
    sampled: torch.Tensor,  # [n] int64
    topk_ids: torch.Tensor,  # [n, NUM_TOPK]
    _topk_stride: int,
    idx_mapping: torch.Tensor,  # [n]
    num_custom_ids: torch.Tensor,  # [max_num_reqs]
    custom_ids: torch.Tensor,  # [max_num_reqs, MAX_LOGPROB_TOKEN_IDS]
    *_: Any,
    NUM_TOPK: int,
    **_constants: Any,
) -> None:
    """``_fill_logprob_token_ids_kernel``: the sampled token, then custom or else top-k ids."""
    out_token_ids[:, 0] = sampled
    out_valid[:, 0] = True
    for i, req in enumerate(idx_mapping.tolist()):
        num_custom = int(num_custom_ids[req])
        source = custom_ids[req, :num_custom] if num_custom else topk_ids[i, :NUM_TOPK]
        out_token_ids[i, 1 : 1 + len(source)] = source
        out_valid[i, 1 : 1 + len(source)] = True
