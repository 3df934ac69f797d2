"""Log softmax of raw logits at chosen tokens."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_ids", "token_ids_stride"])
def token_logprobs_kernel(
    logits_ptr,  # [num_rows, VOCAB_SIZE]
    logits_stride,
    token_ids_ptr,  # [num_rows, num_ids] int64
    token_ids_stride,
    logprobs_ptr,  # [num_rows, num_ids] float32
    num_ids,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IDS_BLOCK: tl.constexpr,
):
    """Grid (num_rows,): one pass for max and sum together, then the chosen tokens."""
    row_idx = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row_idx * logits_stride
    row_max = float("-inf")
    total = 0.0
    for start in range(0, VOCAB_SIZE, BLOCK):
        block = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_row + block, mask=block < VOCAB_SIZE, other=float("-inf"))
        logits = logits.to(tl.float32)
        new_max = tl.maximum(row_max, tl.max(logits, axis=0))
        weights = tl.where(logits == float("-inf"), 0.0, tl.exp(logits - new_max))
        kept = tl.where(row_max == float("-inf"), 0.0, total * tl.exp(row_max - new_max))
        total = kept + tl.sum(weights, axis=0)
        row_max = new_max
    log_total = tl.log(total)
    for start in range(0, num_ids, IDS_BLOCK):
        column = start + tl.arange(0, IDS_BLOCK)
        wanted = column < num_ids
        ids = tl.load(token_ids_ptr + row_idx * token_ids_stride + column, mask=wanted, other=0)
        logits = tl.load(logits_row + ids, mask=wanted, other=0.0).to(tl.float32)
        tl.store(
            logprobs_ptr + row_idx * num_ids + column, logits - row_max - log_total, mask=wanted
        )
