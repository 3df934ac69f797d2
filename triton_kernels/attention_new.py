"""The step's new tokens in decode attention: they take part, and go to their slots of the cache."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.attention_rotary import load_rotated
from fusedstep.kernels.attention_tile import add_tile, quantised, scores

NEW = tl.constexpr(16)  # new tokens of a row, padded for tl.dot


@triton.jit
def add_new(
    row_max,
    weight,
    sums,
    query,
    query_tokens,
    slopes,
    new_tokens,  # the first, how many, and the first's position
    kv_head,
    m_block,
    tokens,
    cache_ptr,
    rows,
    layer,
    rotation,
    strides,
    scale,
    soft_cap,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    FP8_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    QK_NORM: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """Add the row's new tokens to the running softmax, and write them to their slots."""
    first_token, num_new, first_position = new_tokens
    dims = tl.arange(0, DIMS)
    in_head = dims < HEAD_SIZE
    new = tl.arange(0, NEW)
    is_new = new < num_new
    token = first_token.to(tl.int64) + new
    key_offsets = token * strides.key[0] + kv_head * strides.key[1]
    value_offsets = token * strides.value[0] + kv_head * strides.value[1]
    new_mask = is_new[:, None] & in_head
    cache_dtype: tl.constexpr = cache_ptr.dtype.element_ty
    if ROTARY_DIM > 0:
        new_keys = load_rotated(
            tokens.key,
            key_offsets[:, None],
            new_mask,
            first_position + new,
            rotation.key_norm,
            rotation,
            HEAD_SIZE,
            DIMS,
            ROTARY_DIM,
            QK_NORM,
            ROUNDED,
        )
    else:
        new_keys = tl.load(tokens.key + key_offsets[:, None] + dims, mask=new_mask, other=0.0)
    new_values = tl.load(tokens.value + value_offsets[:, None] + dims, mask=new_mask, other=0.0)
    new_keys = quantised(new_keys, layer.k_scale, cache_dtype, FP8_MAX)
    new_values = quantised(new_values, layer.v_scale, cache_dtype, FP8_MAX)
    num_written = tl.where(m_block == 0, num_new, 0)
    slots = tl.load(rows.slots + token, mask=new < num_written, other=-1).to(tl.int64)
    writes = (slots >= 0)[:, None] & in_head
    slot_offsets = (slots // BLOCK_SIZE) * strides.cache[0] + kv_head * strides.cache[1]
    slot_offsets += (slots % BLOCK_SIZE) * strides.cache[2]
    tl.store(cache_ptr + slot_offsets[:, None] + dims, new_keys, mask=writes)
    tl.store(cache_ptr + HEAD_SIZE + slot_offsets[:, None] + dims, new_values, mask=writes)
    distances = query_tokens[:, None] - new
    new_seen = is_new & (distances >= 0)
    if WINDOW > 0:
        new_seen = new_seen & (distances < WINDOW)
    new_scores = scores(
        query, tl.trans(new_keys), new, slopes, scale, soft_cap, SOFT_CAP, ALIBI, PRECISION
    )
    row_max, weight, sums = add_tile(
        row_max, weight, sums, new_scores, new_seen, new_values, query, PRECISION
    )
    return row_max, weight, sums
