"""Norm of heads and rotary embedding of queries and keys, as they are loaded.

Both are vLLM's: RMSNorm over a head in float32 (Qwen3), then the Neox rotation of the first
ROTARY_DIM dims, dim i with dim i + ROTARY_DIM / 2, in float32, rounded once. With ROUNDED the norm
rounds before and after its weight, as vLLM's kernels do when each runs by itself; without, nothing
is rounded between norm and rotation, as in the kernel that Inductor makes of both.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rotated(
    ptr,
    offsets,  # [n, 1] of heads
    mask,  # [n, DIMS]
    positions,  # [n]
    norm_ptr,  # [HEAD_SIZE] weights; unused unless QK_NORM
    rotation,  # cos_sin [positions, ROTARY_DIM], query_norm, key_norm, stride, epsilon
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    QK_NORM: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """Heads [n, DIMS], normed and rotated, in the dtype they are stored in; 0 where masked."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    dtype: tl.constexpr = ptr.dtype.element_ty
    dims = tl.arange(0, DIMS)
    # The dim that each is rotated with, by a second load: from registers it would be an exchange.
    partners = (dims + HALF) % ROTARY_DIM
    states = tl.load(ptr + offsets + dims, mask=mask, other=0.0).to(tl.float32)
    others = tl.load(ptr + offsets + partners, mask=mask, other=0.0).to(tl.float32)
    in_rotary = dims < ROTARY_DIM
    angles = rotation.cos_sin + (positions.to(tl.int64) * rotation.stride)[:, None] + dims % HALF
    rotates = mask & in_rotary
    cos = tl.load(angles, mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(angles + HALF, mask=rotates, other=0.0).to(tl.float32)
    if QK_NORM:
        in_head = dims < HEAD_SIZE
        weights = tl.load(norm_ptr + dims, mask=in_head, other=0.0).to(tl.float32)
        other_weights = tl.load(norm_ptr + partners, mask=in_head, other=0.0).to(tl.float32)
        variance = tl.sum(states * states, axis=1) / HEAD_SIZE
        factor = tl.rsqrt(variance + rotation.epsilon)[:, None]
        states = _weighted(states * factor, weights, dtype, ROUNDED)
        others = _weighted(others * factor, other_weights, dtype, ROUNDED)
    rotated = states * cos + others * tl.where(dims < HALF, -sin, sin)
    return tl.where(in_rotary, rotated, states).to(dtype)


@triton.jit
def _weighted(states, weights, dtype: tl.constexpr, ROUNDED: tl.constexpr):
    """Normed states times the norm's weights."""
    if ROUNDED:
        return (states.to(dtype).to(tl.float32) * weights).to(dtype).to(tl.float32)
    return states * weights


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def rotate_kernel(
    heads,  # query and key [num_tokens, heads, HEAD_SIZE], and where they go, of one dtype
    seq_lens_ptr,  # [num_rows], the new tokens included
    starts_ptr,  # [num_rows + 1]: row i's new tokens are starts[i : i + 2]
    rotation,
    strides,  # of a token and of a head, of each of ``heads``
    num_tokens,
    num_rows,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    QK_NORM: tl.constexpr,
    ROUNDED: tl.constexpr,
    ROW_BITS: tl.constexpr,  # num_rows < 2**ROW_BITS
    BLOCK: tl.constexpr,  # heads of a program
):
    """Grid (blocks of queries, then of keys): heads of any batch; nothing for tokens of no row."""
    block = tl.program_id(0)
    query_blocks = (num_tokens * NUM_HEADS + BLOCK - 1) // BLOCK
    if block < query_blocks:
        _rotate_block(
            block,
            (heads.query, heads.rotated_query, strides.query, strides.rotated_query),
            rotation.query_norm,
            seq_lens_ptr,
            starts_ptr,
            rotation,
            num_rows,
            HEAD_SIZE,
            DIMS,
            NUM_HEADS,
            ROTARY_DIM,
            QK_NORM,
            ROUNDED,
            ROW_BITS,
            BLOCK,
        )
    else:
        _rotate_block(
            block - query_blocks,
            (heads.key, heads.rotated_key, strides.key, strides.rotated_key),
            rotation.key_norm,
            seq_lens_ptr,
            starts_ptr,
            rotation,
            num_rows,
            HEAD_SIZE,
            DIMS,
            NUM_KV_HEADS,
            ROTARY_DIM,
            QK_NORM,
            ROUNDED,
            ROW_BITS,
            BLOCK,
        )


@triton.jit
def _rotate_block(
    block,
    states,  # from where, to where, and both's strides
    norm_ptr,
    seq_lens_ptr,
    starts_ptr,
    rotation,
    num_rows,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    QK_NORM: tl.constexpr,
    ROUNDED: tl.constexpr,
    ROW_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    source, target, source_strides, target_strides = states
    dims = tl.arange(0, DIMS)
    number = block * BLOCK + tl.arange(0, BLOCK)
    token = number // NUM_HEADS
    head = number % NUM_HEADS
    in_row = token < tl.load(starts_ptr + num_rows)
    # The token's row: as many rows end at it or before it.
    row = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(ROW_BITS):
        further = row + (1 << (ROW_BITS - 1 - i))
        ends = tl.load(starts_ptr + further, mask=further <= num_rows, other=2**31 - 1)
        row = tl.where(ends <= token, further, row)
    seq_len = tl.load(seq_lens_ptr + row, mask=in_row, other=0)
    end = tl.load(starts_ptr + row + 1, mask=in_row, other=0)
    positions = tl.maximum(seq_len - (end - token), 0)
    mask = in_row[:, None] & (dims < HEAD_SIZE)
    token = token.to(tl.int64)
    rotated = load_rotated(
        source,
        (token * source_strides[0] + head * source_strides[1])[:, None],
        mask,
        positions,
        norm_ptr,
        rotation,
        HEAD_SIZE,
        DIMS,
        ROTARY_DIM,
        QK_NORM,
        ROUNDED,
    )
    offsets = token * target_strides[0] + head * target_strides[1]
    tl.store(target + offsets[:, None] + dims, rotated, mask=mask)
