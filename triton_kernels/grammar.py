"""Structured output: what a request's grammar forbids, and where its token leads.

``grammar`` are the tensors of ``ops/types.GrammarState``. Both kernels touch what no other launch
of the step touches at the same time: the ends of launches order them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.rows import PAD_SLOT_ID

FREE = tl.constexpr(-1)
OUTSIDE = tl.constexpr(-2)
REASONS = tl.constexpr(-3)


@triton.jit
def constrain_kernel(
    logits_ptr, logits_stride, rows, grammar, VOCAB_SIZE: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Mask the tokens that a row's grammar forbids. Grid: blocks of the vocabulary, rows."""
    split, batch_idx = tl.program_id(0), tl.program_id(1)
    if split == 0:
        tl.store(rows.sampled + batch_idx, -1)  # until the row samples
    req = tl.load(rows.idx_mapping + batch_idx)
    if req < 0:
        return
    state = tl.load(grammar.states + req)
    if state < 0:
        return
    WORDS: tl.constexpr = (VOCAB_SIZE + 31) // 32
    mask_row = grammar.masks + tl.load(grammar.mask_ids + state).to(tl.int64) * WORDS
    word_ids = split * (BLOCK_V // 32) + tl.arange(0, BLOCK_V // 32)
    words = tl.load(mask_row + word_ids, mask=word_ids < WORDS, other=-1)
    allowed = (words[:, None] >> tl.arange(0, 32)[None, :]) & 1
    token_ids = word_ids[:, None] * 32 + tl.arange(0, 32)[None, :]
    logits_row = logits_ptr + batch_idx.to(tl.int64) * logits_stride
    forbidden = (allowed == 0) & (token_ids < VOCAB_SIZE)
    tl.store(logits_row + token_ids, float("-inf"), mask=forbidden)


@triton.jit
def follow_kernel(
    ends_rows,  # of a window, outside of the tables
    slot_stride,
    rows,
    requests,
    inputs,
    grammar,
    NUM_GROUPS: tl.constexpr,
):
    """Move a row's request on in its grammar, by the token that it has sampled. Grid: rows."""
    batch_idx = tl.program_id(0)
    req = tl.load(rows.idx_mapping + batch_idx)
    token = tl.load(rows.sampled + batch_idx)
    if (req < 0) | (token < 0):
        return
    before = tl.load(grammar.states + req)
    is_active = tl.load(rows.active + batch_idx).to(tl.int1)
    state = _state_after(token, req, before, grammar)
    tl.debug_barrier()  # other threads may still load what is stored now
    tl.store(grammar.states + req, state)
    if state == OUTSIDE:
        tl.store(requests.stopped + req, 1)
        if (ends_rows != 0) & is_active:
            tl.store(rows.active + batch_idx, 0)
            tl.atomic_add(rows.num_active, -1, sem="relaxed")
            for group in tl.static_range(NUM_GROUPS):
                slot_ptr = inputs.slot_mappings + group * slot_stride + batch_idx
                tl.store(slot_ptr, PAD_SLOT_ID)


@triton.jit
def _state_after(token, req, state, grammar):
    """A token whose bytes lead nowhere, or that has none, ends the grammar."""
    position = tl.load(grammar.token_starts + token)
    end = tl.load(grammar.token_starts + token + 1)
    if state <= REASONS:
        ends, begins = grammar.reasoning_ends + 2 * req, grammar.reasoning_ends + 2 * req + 1
        state = tl.where(token == tl.load(ends), -(state - REASONS), state)
        state = tl.where(token == tl.load(begins), OUTSIDE, state)
    elif state >= 0:
        state = tl.where(position == end, FREE, state)
        while (position < end) & (state >= 0):
            byte = tl.load(grammar.token_bytes + position).to(tl.int32)
            state = tl.load(grammar.next_states + state.to(tl.int64) * 256 + byte)
            position += 1
    return state
