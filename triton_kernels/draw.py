"""The fused step's end for rows whose logits somebody else has truncated: draw, then advance.

Grid (NUM_SPLITS, num_reqs), after ``sample.py`` with HANDS_OVER. What top-k or top-p leaves out is
-inf in ``scratch.adjusted``. ``winner.py`` says how the programs of a row are ordered.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.noise import hash_prefix
from fusedstep.kernels.sample import finish, is_truncated
from fusedstep.kernels.winner import arrive, leave_winner, row_winner


@triton.jit(do_not_specialize=["logprobs", "advances"])
def draw_kernel(
    logits_ptr,  # [num_reqs, VOCAB_SIZE], raw
    logits_stride,
    logprobs,
    advances,
    rows,
    requests,
    sampling,
    stop,
    inputs,
    scratch,
    strides,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,  # as in the first launch, like NUM_SPLITS and SPLITS
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
):
    split = tl.program_id(0)
    batch_idx = tl.program_id(1).to(tl.int64)
    token_ids = split * BLOCK_V + tl.arange(0, BLOCK_V)
    in_vocab = token_ids < VOCAB_SIZE
    if tl.load(rows.active + batch_idx) == 0:
        return
    req = tl.load(rows.idx_mapping + batch_idx)
    if not is_truncated(req, sampling, VOCAB_SIZE):
        return
    prefix = hash_prefix(tl.load(sampling.seeds + req), tl.load(inputs.positions + batch_idx))
    row = scratch.adjusted + batch_idx * VOCAB_SIZE
    logits = tl.load(row + token_ids, mask=in_vocab, other=float("-inf"))
    offset = batch_idx * NUM_SPLITS + split
    leave_winner(logits, split * BLOCK_V, 1.0, prefix, offset, scratch, VOCAB_SIZE)
    if not arrive(batch_idx, NUM_SPLITS, scratch):
        return
    token = row_winner(
        batch_idx,
        (row, row, True, 1.0, prefix),
        scratch,
        VOCAB_SIZE,
        BLOCK_V,
        NUM_SPLITS,
        SPLITS,
        SCALED=True,
    )
    finish(
        token,
        logprobs,
        advances,
        batch_idx,
        req,
        logits_ptr + batch_idx * logits_stride,
        rows,
        requests,
        stop,
        inputs,
        scratch,
        strides,
        VOCAB_SIZE,
        NUM_SPLITS,
        SPLITS,
        BLOCK_SIZES,
    )
