"""Places several tokens of each row: what a round verifies, and what its drafter reads."""

from __future__ import annotations

import triton
import triton.language as tl

PAD_SLOT_ID = tl.constexpr(-1)


@triton.jit(do_not_specialize=["num_reqs", "ahead", "num_drafts"])
def place_kernel(
    drafts_ptr,  # [num_reqs, d] int64
    drafts_stride,
    num_drafts,  # of a row, that there are
    back_ptr,  # [num_reqs] int32, or None
    ahead,
    num_reqs,
    rows,
    requests,
    inputs,
    out,
    max_num_reqs,
    max_num_tokens,
    max_model_len,
    slot_stride,
    strides,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,  # WIDTH, rounded up to a power of two
    BLOCK_SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (num_reqs + 1): one program per row; the last one clears what lies behind them."""
    batch_idx = tl.program_id(0)
    if batch_idx == num_reqs:
        _clear_tail(
            num_reqs, max_num_reqs, max_num_tokens, out, slot_stride, WIDTH, BLOCK_SIZES, BLOCK
        )
        return
    at = batch_idx * WIDTH
    token = tl.arange(0, TOKENS)
    is_token = token < WIDTH
    req = tl.load(rows.idx_mapping + batch_idx)
    if req < 0:
        tl.store(out.last_sampled + batch_idx, at.to(tl.int64))
        tl.store(out.seq_lens + batch_idx, 0)
        tl.store(out.input_ids + at + token, 0, mask=is_token)
        tl.store(out.positions + at + token, 0, mask=is_token)
        for group in tl.static_range(len(BLOCK_SIZES)):
            slots = out.slot_mappings + group * slot_stride + at + token
            tl.store(slots, PAD_SLOT_ID, mask=is_token)
        return
    computed = tl.load(requests.num_computed_tokens + req)
    back = 0
    if back_ptr is not None:
        back = tl.load(back_ptr + batch_idx)
    first = computed - back + ahead
    tl.store(out.last_sampled + batch_idx, (at + back).to(tl.int64))
    tl.store(out.seq_lens + batch_idx, tl.minimum(first + WIDTH, max_model_len))

    position = first + token
    known_ptr = requests.all_token_ids + req * strides.all_token_ids + position
    known = tl.load(known_ptr, mask=is_token & (position <= computed), other=0)
    behind = position - computed - 1
    is_draft = is_token & (behind >= 0) & (behind < num_drafts)
    draft = tl.load(drafts_ptr + batch_idx * drafts_stride + behind, mask=is_draft, other=0)
    token_id = tl.where(is_draft, draft.to(tl.int32), known)
    tl.store(out.input_ids + at + token, token_id, mask=is_token)
    position = tl.minimum(position, max_model_len - 1)
    tl.store(out.positions + at + token, position.to(tl.int64), mask=is_token)
    has_slot = token < tl.where(tl.load(rows.active + batch_idx) != 0, WIDTH, 0)
    for group in tl.static_range(len(BLOCK_SIZES)):
        block_size = BLOCK_SIZES[group]
        row_ptr = inputs.input_block_tables[group] + batch_idx * strides.block_tables[group]
        block = tl.load(row_ptr + position // block_size, mask=has_slot, other=0).to(tl.int64)
        slot = tl.where(has_slot, block * block_size + position % block_size, PAD_SLOT_ID)
        tl.store(out.slot_mappings + group * slot_stride + at + token, slot, mask=is_token)


@triton.jit
def _clear_tail(
    num_reqs,
    max_num_reqs,
    max_num_tokens,
    out,
    slot_stride,
    WIDTH: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Length 0 and no KV slot for every entry behind the batch, as a padded graph needs."""
    for start in range(num_reqs, max_num_reqs, BLOCK):
        batch_idx = start + tl.arange(0, BLOCK)
        tl.store(out.seq_lens + batch_idx, 0, mask=batch_idx < max_num_reqs)
    for group in tl.static_range(len(BLOCK_SIZES)):
        slots = out.slot_mappings + group * slot_stride
        for start in range(num_reqs * WIDTH, max_num_tokens, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            tl.store(slots + offset, PAD_SLOT_ID, mask=offset < max_num_tokens)
