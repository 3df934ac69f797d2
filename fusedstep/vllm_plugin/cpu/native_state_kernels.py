"""Kernels of vLLM's that keep recurrent state and KV blocks, on the CPU: numba.

Each has the arguments of its Triton kernel (``v1/worker/mamba_utils.py``, ``v1/worker/utils.py``)
as far as they are needed, as numpy arrays; states and tables come as addresses, as from vLLM.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import numpy as np
from numba import carray

from fusedstep.vllm_plugin.cpu.native_kernels import _kernel, _pointer


@_kernel
def zero_blocks(addresses, block_strides, page_sizes, block_ids):
    """Zeroes each block in every segment; strides and sizes are in words of 4 bytes."""
    for segment in range(len(addresses)):
        size = page_sizes[segment]
        for block in block_ids:
            start = np.int64(addresses[segment]) + block * block_strides[segment] * 4
            carray(_pointer(start), size, np.int32)[:] = 0


@_kernel
def advance_running_blocks(
    idx_mapping,
    running,
    num_computed_tokens,
    query_start_loc,
    num_accepted,
    previous,
    bias,
    num_reqs,
    block_size,
):
    """The block of each request's state before and after this step."""
    for batch_idx in range(num_reqs):
        req = idx_mapping[batch_idx]
        query_len = query_start_loc[batch_idx + 1] - query_start_loc[batch_idx]
        before = running[req]
        after = (num_computed_tokens[req] + query_len + block_size - 1) // block_size - 1
        previous[req] = before
        bias[req] = max(num_accepted[req] - 1, 0)
        running[req] = after
        if before >= 0 and before != after:
            num_accepted[req] = 1


@_kernel
def _copy(source, target, num_bytes):
    """From low to high: a move to the left may overlap."""
    old = carray(_pointer(source), num_bytes, np.uint8)
    new = carray(_pointer(target), num_bytes, np.uint8)
    for i in range(num_bytes):
        new[i] = old[i]


@_kernel
def _copy_state(state, table, source, target, bias, layout, rows_first):
    """One layer's state from column ``source`` of a block table to ``target``, without the oldest
    ``bias`` tokens of a convolution; of other states the one ``bias`` columns further."""
    address, width = layout.addresses[state], np.int64(layout.conv_widths[state])
    stride, item = layout.block_strides[state], np.int64(layout.item_sizes[state])
    new = address + np.int64(table[target]) * stride
    if width == 0:
        old = address + np.int64(table[source + bias]) * stride
        _copy(old, new, layout.inner_sizes[state] * item)
        return
    old = address + np.int64(table[source]) * stride
    if rows_first:
        for row in range(layout.num_rows[state]):
            offset = row * layout.row_strides[state]
            _copy(old + offset + bias * item, new + offset, (width - bias) * item)
    else:
        token = layout.inner_sizes[state] * item
        _copy(old + bias * token, new, (width - bias) * token)


@_kernel
def copy_across_blocks(
    running, previous, bias, tables, table_stride, layout, idx_mapping, num_reqs, rows_first
):
    """Takes each request's states along into the block that it begins."""
    for batch_idx in range(num_reqs):
        req = idx_mapping[batch_idx]
        if req < 0 or previous[req] < 0 or previous[req] == running[req]:
            continue
        for state in range(len(layout.addresses)):
            group = layout.groups[state]
            start = tables[group] + req * table_stride * 4
            table = carray(_pointer(start), table_stride, np.int32)
            _copy_state(
                state, table, previous[req], running[req], np.int64(bias[req]), layout, rows_first
            )


@_kernel
def keep_aligned_states(
    num_accepted,
    running,
    num_computed_tokens,
    tables,
    table_stride,
    layout,
    new_num_accepted,
    idx_mapping,
    num_reqs,
    block_size,
    rows_first,
):
    """After a step that passed the end of a block: its state there goes into that block."""
    for batch_idx in range(num_reqs):
        req = idx_mapping[batch_idx]
        if req < 0:
            continue
        computed = num_computed_tokens[req]
        stands_at = computed - num_accepted[req] + 1
        aligned = computed // block_size * block_size
        if aligned < stands_at:
            continue
        source, target, bias = running[req], aligned // block_size - 1, aligned - stands_at
        if source == target:
            new_num_accepted[req] = 1
            if bias == 0:
                continue
        for state in range(len(layout.addresses)):
            group = layout.groups[state]
            start = tables[group] + req * table_stride * 4
            table = carray(_pointer(start), table_stride, np.int32)
            _copy_state(state, table, source, target, np.int64(bias), layout, rows_first)
