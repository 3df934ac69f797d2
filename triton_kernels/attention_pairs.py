"""Tiles of an fp8 cache, loaded as 16-bit pairs of neighbouring dims.

Tensor cores take 16-bit numbers of two tokens at a time. From shared memory they come in that
layout if they have 16 bits there, too; single bytes would be loaded one by one. So a pair travels
as one number until it is in registers, and even and odd dims are products of their own: sums over
dims may be taken in any order. Products are of float16, which holds every e4m3 number exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.attention_tile import scores_of, weigh
from fusedstep.kernels.target import is_cuda

# Queries beyond float16: those of bfloat16 are divided, and limited to 2**20. What that loses of
# small ones is less than 2**-20 of a unit: as much as bfloat16 loses of a number of 2**-12.
QUERY_DIVISOR = tl.constexpr(16.0)
# Weights have a largest one of 2**14, not 1: float16 holds less of small ones.
WEIGHT_BITS = tl.constexpr(14.0)


@triton.jit
def as_half(query):
    """Query as float16, and by what its products have to be multiplied."""
    if query.dtype == tl.float16:
        return query, 1.0
    divided = query.to(tl.float32) / QUERY_DIVISOR
    limited = tl.where(divided > 65504.0, 65504.0, tl.where(divided < -65504.0, -65504.0, divided))
    return limited.to(tl.float16), QUERY_DIVISOR


@triton.jit
def _even(pairs, CACHE_DTYPE: tl.constexpr):
    """The first numbers of pairs (int16) as float16."""
    if is_cuda():
        # Two pairs in one register: their bytes 0 2 1 3 are the first numbers, then the second.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted; .reg .b16 first, second;
            prmt.b32 sorted, $1, 0, 0x3120;
            mov.b32 {first, second}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, first;
            }""",
            "=r,r",
            [pairs],
            tl.float16,
            is_pure=True,
            pack=2,
        )
    return (pairs & 0xFF).to(tl.int8).to(CACHE_DTYPE, bitcast=True).to(tl.float16)


@triton.jit
def _odd(pairs, CACHE_DTYPE: tl.constexpr):
    """The second numbers of pairs as float16."""
    if is_cuda():
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted; .reg .b16 first, second;
            prmt.b32 sorted, $1, 0, 0x3120;
            mov.b32 {first, second}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, second;
            }""",
            "=r,r",
            [pairs],
            tl.float16,
            is_pure=True,
            pack=2,
        )
    return (pairs >> 8).to(tl.int8).to(CACHE_DTYPE, bitcast=True).to(tl.float16)


@triton.jit
def pair_scores(
    even_query,  # [queries, dims / 2] float16
    odd_query,
    keys,  # [dims / 2, n] int16
    distances,
    slopes,
    scale,
    soft_cap,
    CACHE_DTYPE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """As ``attention_tile.scores``."""
    products = tl.dot(even_query, _even(keys, CACHE_DTYPE))
    products = tl.dot(odd_query, _odd(keys, CACHE_DTYPE), products)
    return scores_of(products, distances, slopes, scale, soft_cap, SOFT_CAP, ALIBI)


@triton.jit
def add_pairs(
    row_max,
    weight,
    even_sums,  # [queries, dims / 2]
    odd_sums,
    tile_scores,
    seen,
    values,  # [n, dims / 2] int16
    CACHE_DTYPE: tl.constexpr,
):
    """As ``attention_tile.add_tile``; ``row_max`` is WEIGHT_BITS less than the largest score."""
    row_max, kept, weights, weight = weigh(row_max, weight, tile_scores, seen, WEIGHT_BITS)
    weights = weights.to(tl.float16)
    even_sums = tl.dot(weights, _even(values, CACHE_DTYPE), even_sums * kept[:, None])
    odd_sums = tl.dot(weights, _odd(values, CACHE_DTYPE), odd_sums * kept[:, None])
    return row_max, weight, even_sums, odd_sums
