"""Prepares a window's rows, and advances a row when its token is known.

Only a row's last program calls ``advance`` (``winner.py``), so nothing of a row has two writers.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAD_SLOT_ID = tl.constexpr(-1)
NULL_BLOCK_ID = tl.constexpr(0)
STOP_BLOCK = tl.constexpr(128)


@triton.jit
def _place_input(batch_idx, token, position, inputs):
    tl.store(inputs.input_ids + batch_idx, token.to(tl.int32))
    tl.store(inputs.positions + batch_idx, position.to(tl.int64))
    tl.store(inputs.seq_lens + batch_idx, position + 1)


@triton.jit
def _map_slots(
    batch_idx, position, active, tables, table_row, inputs, strides, BLOCK_SIZES: tl.constexpr
):
    """Store the KV slot of ``position`` in every group, from ``table_row`` of ``tables``."""
    for group in tl.static_range(len(BLOCK_SIZES)):
        block_size = BLOCK_SIZES[group]
        entry = tables[group] + table_row * strides.block_tables[group] + position // block_size
        block = tl.load(entry, mask=active, other=0).to(tl.int64)
        slot = tl.where(active, block * block_size + position % block_size, PAD_SLOT_ID)
        tl.store(inputs.slot_mappings + group * strides.slot_mappings + batch_idx, slot)


@triton.jit
def advance(
    token,
    batch_idx,
    req,
    rows,
    requests,
    stop,
    inputs,
    strides,
    BLOCK_SIZES: tl.constexpr,
):
    """Emit ``token``, apply vLLM's ``check_stop``, stop the row or write its next input."""
    step = tl.load(rows.num_sampled + batch_idx)
    steps_allowed = tl.load(rows.steps_allowed + batch_idx)
    total_len = tl.load(requests.total_len + req)
    position = tl.load(requests.num_computed_tokens + req) + 1
    count_ptr = requests.output_bin_counts + req * strides.output_bin_counts + token
    count = tl.load(count_ptr)
    # All threads have loaded the values above before one of them overwrites them below.
    tl.debug_barrier()
    tl.store(rows.out_tokens + step * strides.out_tokens + batch_idx, token.to(tl.int64))
    tl.store(rows.num_sampled + batch_idx, step + 1)
    tl.store(requests.last_sampled_tokens + req, token.to(tl.int64))
    tl.store(requests.all_token_ids + req * strides.all_token_ids + total_len, token.to(tl.int32))
    tl.store(requests.total_len + req, total_len + 1)
    tl.store(requests.num_computed_tokens + req, position)
    tl.store(count_ptr, count + 1)

    must_stop = total_len + 1 >= tl.load(stop.max_len + req)
    num_stop = tl.load(stop.num_stop_token_ids + req)
    for start in range(0, num_stop, STOP_BLOCK):
        column = start + tl.arange(0, STOP_BLOCK)
        ids = tl.load(
            stop.stop_token_ids + req * strides.stop_token_ids + column,
            mask=column < num_stop,
            other=-1,
        )
        must_stop = must_stop | (tl.max((ids == token).to(tl.int32)) > 0)
    active = (step + 1 < steps_allowed) & (must_stop == 0)
    if must_stop:
        tl.store(requests.stopped + req, True)
    if active:
        _place_input(batch_idx, token, position, inputs)
    else:
        tl.store(rows.active + batch_idx, False)
        weight = tl.where(must_stop, tl.load(rows.stop_weight), 1)
        # Atomic: other rows subtract, too. Relaxed: it is read by later launches only.
        tl.atomic_add(rows.num_active, -weight, sem="relaxed")
    _map_slots(
        batch_idx,
        position,
        active,
        inputs.input_block_tables,
        batch_idx,
        inputs,
        strides,
        BLOCK_SIZES,
    )


@triton.jit(do_not_specialize=["num_reqs"])
def prepare_kernel(
    rows,
    num_reqs,
    requests,
    inputs,
    block_tables,  # per group [R, max_num_blocks] int32
    num_blocks,  # [num_groups, R] int32
    max_num_reqs,
    max_num_tokens,
    strides,
    BLOCK_SIZES: tl.constexpr,
    SLIDING_REACH: tl.constexpr,  # per group, see ``StepInputs``
    BLOCK: tl.constexpr,
):
    """Grid (num_reqs + 1): one program per row; the last one counts them and clears the tail."""
    batch_idx = tl.program_id(0)
    if batch_idx == num_reqs:
        _count_active(rows, num_reqs, requests, BLOCK)
        _clear_tail(num_reqs, max_num_reqs, max_num_tokens, inputs, strides, BLOCK_SIZES, BLOCK)
        return
    req = tl.load(rows.idx_mapping + batch_idx)
    tl.store(rows.num_sampled + batch_idx, 0)
    if req < 0:
        tl.store(rows.active + batch_idx, False)
        tl.store(inputs.input_ids + batch_idx, 0)
        tl.store(inputs.positions + batch_idx, 0)
        tl.store(inputs.seq_lens + batch_idx, 0)
        for group in tl.static_range(len(BLOCK_SIZES)):
            slot = inputs.slot_mappings + group * strides.slot_mappings + batch_idx
            tl.store(slot, PAD_SLOT_ID)
        return
    position = tl.load(requests.num_computed_tokens + req)
    active = (tl.load(requests.stopped + req) == 0) & (tl.load(rows.steps_allowed + batch_idx) > 0)
    tl.store(rows.active + batch_idx, active)
    _place_input(batch_idx, tl.load(requests.last_sampled_tokens + req), position, inputs)
    for group in tl.static_range(len(BLOCK_SIZES)):
        stride = strides.block_tables[group]
        num_valid = tl.load(num_blocks + group * max_num_reqs + req)
        num_below = 0
        if SLIDING_REACH[group] > 0:
            num_below = tl.maximum(position - SLIDING_REACH[group], 0) // BLOCK_SIZES[group]
        for start in range(0, num_valid, BLOCK):
            column = start + tl.arange(0, BLOCK)
            valid = column < num_valid
            ids_ptr = block_tables[group] + req * stride + column
            ids = tl.load(ids_ptr, mask=valid & (column >= num_below), other=NULL_BLOCK_ID)
            row_ptr = inputs.input_block_tables[group] + batch_idx * stride
            tl.store(row_ptr + column, ids, mask=valid)
    _map_slots(batch_idx, position, active, block_tables, req, inputs, strides, BLOCK_SIZES)


@triton.jit
def _count_active(rows, num_reqs, requests, BLOCK: tl.constexpr):
    """Store num_active. From the inputs: other programs are still writing ``rows.active``."""
    num_active = 0
    for start in range(0, num_reqs, BLOCK):
        batch_idx = start + tl.arange(0, BLOCK)
        in_batch = batch_idx < num_reqs
        req = tl.load(rows.idx_mapping + batch_idx, mask=in_batch, other=-1)
        valid = req >= 0
        stopped = tl.load(requests.stopped + req, mask=valid, other=True)
        steps_allowed = tl.load(rows.steps_allowed + batch_idx, mask=in_batch, other=0)
        active = valid & (stopped == 0) & (steps_allowed > 0)
        num_active += tl.sum(active.to(tl.int32))
    tl.store(rows.num_active, num_active)


@triton.jit
def _clear_tail(
    num_reqs,
    max_num_reqs,
    max_num_tokens,
    inputs,
    strides,
    BLOCK_SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Length 0 and no KV slot for every entry after the batch, as a padded graph needs."""
    for start in range(num_reqs, max_num_reqs, BLOCK):
        batch_idx = start + tl.arange(0, BLOCK)
        tl.store(inputs.seq_lens + batch_idx, 0, mask=batch_idx < max_num_reqs)
    for group in tl.static_range(len(BLOCK_SIZES)):
        slots = inputs.slot_mappings + group * strides.slot_mappings
        for start in range(num_reqs, max_num_tokens, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            tl.store(slots + offset, PAD_SLOT_ID, mask=offset < max_num_tokens)
