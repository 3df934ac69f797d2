"""The fused step's last launch where logprobs are asked for: ranks of the sampled tokens.

Grid (NUM_SPLITS, num_reqs), after the launch that knows the token. Only splits whose largest logit
reaches the token's are read again: mostly few.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rank_kernel(
    logits_ptr,  # [num_reqs, VOCAB_SIZE], raw
    logits_stride,
    rows,
    scratch,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,  # as in the first launch, like NUM_SPLITS
    NUM_SPLITS: tl.constexpr,
):
    """Add to each rank, which is zero, the tokens of a split that are at least as likely."""
    split = tl.program_id(0)
    batch_idx = tl.program_id(1).to(tl.int64)
    value = tl.load(scratch.sampled_logits + batch_idx)  # NaN: the row was not active
    split_max = tl.load(scratch.split_max + batch_idx * NUM_SPLITS + split)
    if split_max >= value:
        token_ids = split * BLOCK_V + tl.arange(0, BLOCK_V)
        in_vocab = token_ids < VOCAB_SIZE
        logits_row = logits_ptr + batch_idx * logits_stride
        logits = tl.load(logits_row + token_ids, mask=in_vocab, other=float("-inf"))
        count = tl.sum(((logits.to(tl.float32) >= value) & in_vocab).to(tl.int32), axis=0)
        # Atomic: other splits add, too. Relaxed: it is read by later launches only.
        tl.atomic_add(rows.ranks + batch_idx, count.to(tl.int64), sem="relaxed")
