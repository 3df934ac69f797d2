"""One tile of keys and values: scores in base 2, the running softmax, quantised caches."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Below every score, and finite: differences of it are numbers.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def scores(
    query,  # [queries, dims]
    keys,  # [dims, n], as they are in the cache
    distances,  # [n] positions less that of the first new token, for ALiBi
    slopes,  # [queries] float32
    scale,
    soft_cap,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[queries, n] float32, times log2(e)."""
    products = tl.dot(query, keys.to(query.dtype), input_precision=PRECISION)
    return scores_of(products, distances, slopes, scale, soft_cap, SOFT_CAP, ALIBI)


@triton.jit
def scores_of(
    products,
    distances,
    slopes,
    scale,
    soft_cap,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """Scores of products of queries and keys."""
    if SOFT_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        powers = tl.exp2(products * (scale / soft_cap * (2 * LOG2_E)))
        found = soft_cap * LOG2_E * (1 - 2 / (powers + 1))
    else:
        found = products * (scale * LOG2_E)
    if ALIBI:
        found += slopes[:, None] * LOG2_E * distances.to(tl.float32)
    return found


@triton.jit
def add_tile(row_max, weight, sums, tile_scores, seen, values, query, PRECISION: tl.constexpr):
    """Add a tile to the running softmax: largest score, sum of the weights, weighted values."""
    row_max, kept, weights, weight = weigh(row_max, weight, tile_scores, seen, 0.0)
    values = values.to(query.dtype)
    sums = tl.dot(weights.to(query.dtype), values, sums * kept[:, None], input_precision=PRECISION)
    return row_max, weight, sums


@triton.jit
def weigh(row_max, weight, tile_scores, seen, BITS: tl.constexpr):
    """New largest score less BITS, what is kept of the old sums, weights and their sum."""
    tile_scores = tl.where(seen, tile_scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(tile_scores, axis=1) - BITS)
    kept = tl.exp2(row_max - new_max)
    weights = tl.exp2(tile_scores - new_max[:, None])
    return new_max, kept, weights, weight * kept + tl.sum(weights, axis=1)


@triton.jit
def finish(row_max, weight, sums, sinks, v_scale, SINKS: tl.constexpr):
    """Attention of the queries: weighted values by their weight; zeros where nothing is seen."""
    if SINKS:
        sinks = sinks * LOG2_E
        new_max = tl.maximum(row_max, sinks)
        kept = tl.exp2(row_max - new_max)
        weight = weight * kept + tl.exp2(sinks - new_max)
        sums = sums * kept[:, None]
    return sums * (v_scale / tl.where(weight > 0, weight, 1.0))[:, None]


@triton.jit
def quantised(states, scale_ptr, cache_dtype: tl.constexpr, FP8_MAX: tl.constexpr):
    """New keys or values as the cache will hold them."""
    if FP8_MAX > 0:
        states = states.to(tl.float32) / tl.load(scale_ptr)
        states = tl.minimum(tl.maximum(states, -FP8_MAX), FP8_MAX)
    return states.to(cache_dtype)
