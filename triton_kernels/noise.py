"""Gumbel noise as vLLM's model runner V2 draws it: a hash of (seed, position, token id).

The same operations in the same order as ``vllm/v1/worker/gpu/sample/gumbel.py``, so that a compiler
that treats both alike gives the same bits and a seeded request the same token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.target import is_cuda


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
def _hash(prefix, token_ids):
    """The random number (uint32) of each token id."""
    state = _mix(prefix, token_ids.to(tl.uint32)) ^ 16
    state ^= state >> 16
    state *= 0x85EBCA6B
    state ^= state >> 13
    state *= 0xC2B2AE35
    return state ^ (state >> 16)


@triton.jit
def gumbel_noise(prefix, token_ids):
    """-log(-log(1 - u)) float32, u = (hash + 1/2) / 2**32; the tail that can win is u -> 0."""
    state = _hash(prefix, token_ids)
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


@triton.jit
def _log2(x):
    """log2(x) of a normal number or 0, in one instruction of NVIDIA's."""
    if is_cuda():
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def near_scores(logits, temperature, prefix, token_ids):
    """About (score - NEAR_SHIFT) * temperature of logit / temperature + noise, not less.

    With E = -log(1 - u) the noise is -log(E), so what is at most E gives a score that is at least
    the exact one. Two are, and the larger serves: u itself, good where u is small, and
    -log(1 - u + 2**-21), whose 2**-21 is more than the logarithm's error near 1.
    ``score_bound`` says how near.
    """
    random = _hash(prefix, token_ids).to(tl.float32)  # u * 2**32
    # Both over log(2), whose logarithm is the shift: 2**-32 / log(2), and a logarithm of base 2.
    small = random * 3.359036149664231e-10
    large = -_log2(1.000000476837158203125 - random * 2.3283064365386963e-10)
    return logits + _log2(tl.maximum(small, large)) * (temperature * -0.6931471805599453)


NEAR_SHIFT = tl.constexpr(0.36651292058166435)  # -log(log(2))

# Sum of these errors of a score, rounded up to a power of two:
#
# * ``lg2.approx.f32`` (PTX ISA, 9.7.3.20): 2**-22 between 1/2 and 2, else a relative 2**-22: of a
#   logarithm down to -33, times log(2): 5.5e-6. AMD's and the interpreter's log2 err by an ulp.
# * The two below it, at most E: relative 3e-7 of rounding and of the coefficients: 3e-7.
# * temperature * log(2), float32, times the noise: 2**-23 * 23: 2.8e-6.
# * The exact score's own: two logarithms of 2 ulp each: 23 * 2**-22 + 2**-22: 5.8e-6; its division
#   (``div.full.f32``: 2 ulp) of a logit that is at most 23 away from the score: 5.5e-6.
#
# All that is relative to the score is less than 2**-20 of it: sums, products and that division.
SCORE_ERROR = tl.constexpr(2.0**-15)
SCORE_RELATIVE_ERROR = tl.constexpr(2.0**-20)


@triton.jit
def score_bound(near_score, temperature):
    """No token's score is above this whose near score is not above ``near_score``.

    A score is at most 2**-15 and a 2**-20th of itself above the near score, and for 999 tokens of
    1000 at most 6e-4 below: a split is scored again about that rarely. At temperatures whose
    products might overflow nothing is known: infinity.
    """
    score = near_score / temperature + NEAR_SHIFT
    error = SCORE_RELATIVE_ERROR
    bound = tl.maximum(score * (1.0 + error), score * (1.0 - error)) + SCORE_ERROR
    known = (temperature > 1e-20) & (temperature < 1e20)
    return tl.where(known, bound, float("inf"))
