"""Structured output on the CPU: numba kernels, used by ``native.py``.

``grammar`` is a named tuple of numpy arrays with the fields of ``types.GrammarState``; the others
are those of ``native_rows.py``.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import numpy as np
from numba import njit

from fusedstep.ops.types import FREE, OUTSIDE, PAD_SLOT_ID, REASONS

_kernel = njit(cache=True, nogil=True, error_model="numpy")
_NOTHING_FORBIDDEN = np.int32(-1)


@_kernel
def _mask_row(row, mask, minus_inf):
    """Without a branch for each bit, so that LLVM vectorises it."""
    for word in range(len(row) // 32):
        bits = mask[word]
        if bits == _NOTHING_FORBIDDEN:
            continue
        first = 32 * word
        for bit in range(32):
            row[first + bit] = row[first + bit] if (bits >> bit) & 1 else minus_inf
    for token in range(len(row) // 32 * 32, len(row)):
        if not (mask[token // 32] >> (token % 32)) & 1:
            row[token] = minus_inf


@_kernel
def constrain_rows(logits, stride, minus_inf, vocab_size, num_reqs, rows, grammar):
    """Masks what the requests' grammars forbid. ``minus_inf``: [1], of the logits' dtype."""
    for batch_idx in range(num_reqs):
        rows.sampled[batch_idx] = -1
        req = rows.idx_mapping[batch_idx]
        state = grammar.states[req] if req >= 0 else FREE
        if state < 0:
            continue
        row = logits[batch_idx * stride : batch_idx * stride + vocab_size]
        _mask_row(row, grammar.masks[grammar.mask_ids[state]], minus_inf[0])


@_kernel
def _state_after(token, req, grammar):
    state = grammar.states[req]
    if state <= REASONS:
        if token == grammar.reasoning_ends[req, 1]:
            return OUTSIDE
        return REASONS - state if token == grammar.reasoning_ends[req, 0] else state
    start, end = grammar.token_starts[token], grammar.token_starts[token + 1]
    if start == end and state >= 0:
        return FREE
    for i in range(start, end):
        if state < 0:
            break
        state = grammar.next_states[state, grammar.token_bytes[i]]
    return state


@_kernel
def follow_rows(num_reqs, rows, requests, grammar):
    """Moves the request of each row that has sampled a token on in its grammar."""
    for batch_idx in range(num_reqs):
        req, token = rows.idx_mapping[batch_idx], rows.sampled[batch_idx]
        if token >= 0 and req >= 0:
            state = _state_after(token, req, grammar)
            grammar.states[req] = state
            if state == OUTSIDE:
                requests.stopped[req] = True


@_kernel
def end_rows_outside(num_reqs, rows, grammar, slot_mappings):
    """Ends the rows whose requests are outside of their grammars' tables."""
    for batch_idx in range(num_reqs):
        if rows.active[batch_idx] and grammar.states[rows.idx_mapping[batch_idx]] == OUTSIDE:
            rows.active[batch_idx] = False
            rows.num_active[0] -= 1
            slot_mappings[:, batch_idx] = PAD_SLOT_ID
