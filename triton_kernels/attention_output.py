"""The end of an item of decode attention: its pieces are merged, its output is written."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.attention_tile import LOWEST, finish


@triton.jit
def write_output(
    queries,
    row_max,
    weight,
    sums,
    v_scale,
    first_token,
    query_len,
    kv_head,
    tokens,
    layer,
    strides,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Write the attention of ``queries``, all of whose tiles have been added."""
    is_query = queries < query_len * GROUP
    dims = tl.arange(0, DIMS)
    sinks = tl.zeros(queries.shape, tl.float32)
    if SINKS:
        heads = kv_head * GROUP + queries % GROUP
        sinks = tl.load(layer.sinks + heads, mask=is_query, other=0.0).to(tl.float32)
    result = finish(row_max, weight, sums, sinks, v_scale, SINKS)
    offsets = head_offsets(queries, first_token, kv_head, strides.output, GROUP) + dims
    output_dtype: tl.constexpr = tokens.output.dtype.element_ty
    mask = is_query[:, None] & (dims < HEAD_SIZE)
    tl.store(tokens.output + offsets, result.to(output_dtype), mask=mask)


@triton.jit
def merge(
    start,
    first,
    last,
    share,
    item_start,
    scratch,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_M: tl.constexpr,
):
    """Merge the pieces of the programs ``first`` to ``last`` for CHUNK_M queries from ``start``."""
    queries = start + tl.arange(0, CHUNK_M)
    dims = tl.arange(0, DIMS)
    row_max = tl.full([CHUNK_M], LOWEST, tl.float32)
    weight = tl.zeros([CHUNK_M], tl.float32)
    sums = tl.zeros([CHUNK_M, DIMS], tl.float32)
    for chunk in range(first, last + 1, CHUNK):
        program = chunk + tl.arange(0, CHUNK)
        entry = 2 * program + (program * share < item_start).to(tl.int32)
        offset = entry[:, None] * BLOCK_M + queries
        valid = (program <= last)[:, None] & (queries < BLOCK_M)
        # .cg: other SMs have just written these to L2, and they are read once: no use for L1.
        piece_max = tl.load(
            scratch.piece_max + offset, mask=valid, other=LOWEST, cache_modifier=".cg"
        )
        weights = tl.load(scratch.weights + offset, mask=valid, other=0.0, cache_modifier=".cg")
        parts = tl.load(
            scratch.sums + offset[:, :, None] * DIMS + dims,
            mask=valid[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_max = tl.maximum(row_max, tl.max(piece_max, axis=0))
        kept = tl.exp2(row_max - new_max)
        factors = tl.exp2(piece_max - new_max)
        weight = weight * kept + tl.sum(weights * factors, axis=0)
        sums = sums * kept[:, None] + tl.sum(parts * factors[:, :, None], axis=0)
        row_max = new_max
    return row_max, weight, sums


@triton.jit
def head_offsets(queries, first_token, kv_head, stride, GROUP: tl.constexpr):
    """Offsets [queries, 1] of the heads of ``queries`` in the query or output tensor."""
    token = first_token.to(tl.int64) + queries // GROUP
    return (token * stride[0] + (kv_head * GROUP + queries % GROUP) * stride[1])[:, None]
