"""Gumbel noise as vLLM's model runner V2 draws it: a hash of (seed, position, token id).

The same operations in the same order as ``vllm/v1/worker/gpu/sample/gumbel.py``, so that a compiler
that treats both alike gives the same bits and a seeded request the same token.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rotate_left(value, SHIFT: tl.constexpr):
    return (value << SHIFT) | (value >> (32 - SHIFT))


@triton.jit
def _mix(state, key):
    key *= 0xCC9E2D51
    key = _rotate_left(key, 15)
    key *= 0x1B873593
    state ^= key
    state = _rotate_left(state, 13)
    return state * 5 + 0xE6546B64


@triton.jit
def hash_prefix(seed, position):
    """MurmurHash3 state (uint32) after seed and position, both int64; the same for all tokens."""
    state = (seed ^ seed).to(tl.uint32)
    state = _mix(state, (seed & 0xFFFFFFFF).to(tl.uint32))
    state = _mix(state, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    return _mix(state, (position & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def gumbel_noise(prefix, token_ids):
    """-log(-log(1 - u)) float32, u = (hash + 1/2) / 2**32; the tail that can win is u -> 0."""
    state = _mix(prefix, token_ids.to(tl.uint32)) ^ 16
    state ^= state >> 16
    state *= 0x85EBCA6B
    state ^= state >> 13
    state *= 0xC2B2AE35
    state ^= state >> 16
    high = (state >> 16).to(tl.int32).to(tl.float32)
    low = (state & 0xFFFF).to(tl.int32).to(tl.float32)
    u = high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10
    series = 1.0 / 8.0
    series = 1.0 / 7.0 + u * series
    series = 1.0 / 6.0 + u * series
    series = 1.0 / 5.0 + u * series
    series = 1.0 / 4.0 + u * series
    series = 1.0 / 3.0 + u * series
    series = 1.0 / 2.0 + u * series
    series = 1.0 + u * series
    direct = tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08))
    return -tl.log(-tl.where(u < 0.25, -u * series, direct))
