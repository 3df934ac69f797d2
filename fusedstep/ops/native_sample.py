"""Sampling on the CPU, one row of logits at a time: numba kernels, used by ``native.py``.

A row is sampled as vLLM's model runner V2 does it (``v1/worker/gpu/sample``): bias, penalties, bad
words, temperature, min-p, top-k, top-p, then the argmax of ``logit + Gumbel noise``, where the
noise is a hash of (seed, position, token id). Two ideas keep a row of 49152 logits at tens of
microseconds, without sorting and mostly without logarithms:

* *Bounded noise.* The float32 bits of a number are a piecewise linear approximation of its log2, so
  an upper bound of the noise costs one conversion and one multiply. Blocks whose best bound cannot
  beat the best exact score so far are skipped (``gumbel_argmax``).
* *Sample, then check.* The winner over all tokens is also the winner over the top-p set if it is
  in that set. If it is not, everything that sorts below it is not either, so it all goes and the
  same noise decides among the rest (``top_p_argmax``).

Everything here lives in one file because numba's on-disk cache sees changes of a kernel's own file
only. Loops are plain and branch-free so that LLVM vectorises them; constants are float32 because
numba would compute in float64 otherwise. ``fastmath`` is limited to reductions and to the weights
of top-p; whatever decides a token (scores, noise) is plain IEEE float32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

BLOCK = 1024
NO_TOKEN = -1

_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
_QUARTER = np.float32(0.25)
_INF = np.float32(np.inf)
_MINUS_INF = np.float32(-np.inf)
_TWO_POW_MINUS_16 = np.float32(2.0**-16)
_TWO_POW_MINUS_24 = np.float32(2.0**-24)
_TWO_POW_MINUS_32 = np.float32(2.0**-32)
_INVERSES = tuple(np.float32(1.0 / n) for n in range(1, 9))

# noise <= ln(2) * (32 - log2(hash)) and log2(x) >= bits(x) / 2**23 - 127; the hash is halved to
# fit an int32 (one more ln(2)), 1e-4 covers the roundings.
_BOUND_OFFSET = np.float32(math.log(2.0) * (32 + 127 - 1) + 1e-4)
_BOUND_SLOPE = np.float32(math.log(2.0) * 2.0**-23)

# exp(x) = 2**n * exp(r): Cephes expf coefficients, ln(2) in two parts.
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_EXP_MIN = np.float32(-87.0)
_EXP = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1)
)

_exact = njit(cache=True, nogil=True, error_model="numpy")
_fused = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
_sum_reduction = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "nsz"})


@intrinsic
def float_of_bits(typing_context, bits):
    """The float32 with the bits of an int32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float(typing_context, value):
    """The int32 with the bits of a float32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def widen(typing_context, element):
    """A logit as float32; uint16 holds the bits of a bfloat16, int16 those of a float16."""

    def generate(context, builder, signature, args):
        if element == types.uint16:
            wide = builder.zext(args[0], ir.IntType(32))
            wide = builder.shl(wide, ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        if element == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        return args[0]

    return types.float32(element), generate


@intrinsic
def larger(typing_context, a, b):
    """The larger float32, NaN if one is: unlike a comparison, LLVM vectorises its reduction."""

    def generate(context, builder, signature, args):
        float32 = ir.FloatType()
        signature = ir.FunctionType(float32, [float32, float32])
        maximum = builder.module.declare_intrinsic("llvm.maximum", [float32], signature)
        return builder.call(maximum, args)

    return types.float32(types.float32, types.float32), generate


@_exact
def _rotate(value, shift):
    value = np.uint32(value)
    left = np.uint32(value << np.uint32(shift))
    return np.uint32(left | np.uint32(value >> np.uint32(32 - shift)))


@_exact
def _hash_mix(state, key):
    key = np.uint32(np.uint32(key) * np.uint32(0xCC9E2D51))
    key = np.uint32(_rotate(key, 15) * np.uint32(0x1B873593))
    state = _rotate(np.uint32(state ^ key), 13)
    return np.uint32(np.uint32(state * np.uint32(5)) + np.uint32(0xE6546B64))


@_exact
def hash_prefix(seed, position):
    """MurmurHash3 state after (seed, position), 64 and 32 bits: the part all tokens share."""
    state = _hash_mix(np.uint32(0), np.uint32(seed & 0xFFFFFFFF))
    state = _hash_mix(state, np.uint32((seed >> 32) & 0xFFFFFFFF))
    return _hash_mix(state, np.uint32(position & 0xFFFFFFFF))


@_exact
def _hash_token(prefix, token):
    state = np.uint32(_hash_mix(prefix, np.uint32(token)) ^ np.uint32(16))
    state = np.uint32(state ^ np.uint32(state >> np.uint32(16)))
    state = np.uint32(state * np.uint32(0x85EBCA6B))
    state = np.uint32(state ^ np.uint32(state >> np.uint32(13)))
    state = np.uint32(state * np.uint32(0xC2B2AE35))
    return np.uint32(state ^ np.uint32(state >> np.uint32(16)))


@_exact
def _log(value):
    return np.float32(math.log(np.float64(value)))


@_exact
def gumbel_noise(prefix, token):
    """-log(-log(1 - u)), u = (hash + 1/2) / 2**32; the formula of ``sample/gumbel.py``, float32.

    The logarithms are correctly rounded, so that every correct implementation agrees bit for bit.
    """
    bits = _hash_token(prefix, token)
    high = np.float32(np.int32(bits >> np.uint32(16)))
    low = np.float32(np.int32(bits & np.uint32(0xFFFF)))
    u = high * _TWO_POW_MINUS_16 + (low + _HALF) * _TWO_POW_MINUS_32
    if u < _QUARTER:
        series = _INVERSES[7]
        for n in range(6, -1, -1):
            series = _INVERSES[n] + u * series
        return -_log(u * series)
    return -_log(-_log(max(_ONE - u, _TWO_POW_MINUS_24)))


@_exact
def _max(values):
    top = _MINUS_INF
    for i in range(len(values)):
        top = larger(top, widen(values[i]))
    return top


@_exact
def row_max(row):
    """Largest logit of a row of any dtype, as float32."""
    return _max(row)


@_exact
def argmax(row):
    """First index of the largest logit; ``row`` may hold any of the dtypes of ``widen``."""
    best = _MINUS_INF
    best_start = 0
    for start in range(0, len(row), BLOCK):
        top = _max(row[start : start + BLOCK])
        if top > best:
            best = top
            best_start = start
    for token in range(best_start, min(best_start + BLOCK, len(row))):
        if widen(row[token]) == best:
            return token
    return 0


@_exact
def _bound_scores(row, first_token, prefix, bounds):
    """Writes an upper bound of ``logit + noise`` for each token; returns the largest."""
    top = _MINUS_INF
    for i in range(len(row)):
        half = np.int32(_hash_token(prefix, first_token + i) >> np.uint32(1))
        log2_hash = np.float32(bits_of_float(np.float32(half)))
        bound = row[i] + (_BOUND_OFFSET - _BOUND_SLOPE * log2_hash)
        bounds[i] = bound
        top = larger(top, bound)
    return top


@_exact
def gumbel_argmax(row, prefix, bounds):
    """First index of the largest ``row[i] + gumbel_noise(prefix, i)``; 0 if all are -inf."""
    best = _MINUS_INF
    best_token = 0
    for start in range(0, len(row), BLOCK):
        block = row[start : start + BLOCK]
        if _bound_scores(block, start, prefix, bounds) <= best:
            continue
        for i in range(len(block)):
            if bounds[i] > best:
                score = block[i] + gumbel_noise(prefix, start + i)
                if score > best:
                    best = score
                    best_token = start + i
    return best_token


@_fused
def _exp_block(row, top, weights):
    for i in range(len(row)):
        x = larger(row[i] - top, _EXP_MIN)
        n = np.int32(x * _LOG2_E - _HALF)
        r = x - np.float32(n) * _LN2_HIGH - np.float32(n) * _LN2_LOW
        p = (((_EXP[0] * r + _EXP[1]) * r + _EXP[2]) * r + _EXP[3]) * r + _EXP[4]
        p = ((p * r + _HALF) * r + _ONE) * r + _ONE
        weights[i] = p * float_of_bits(np.int32((n + np.int32(127)) << np.int32(23)))


@_sum_reduction
def _sum(values):
    total = _ZERO
    for i in range(len(values)):
        total += values[i]
    return total


@_exact
def exp_weights(row, top, weights):
    """weights[i] = exp(row[i] - top), relative error 2e-7, never below exp(-87); returns the sum.

    Sums are float32 within a block of 1024 and float64 across blocks.
    """
    total = 0.0
    for start in range(0, len(row), BLOCK):
        block = weights[start : start + BLOCK]
        _exp_block(row[start : start + BLOCK], top, block)
        total += np.float64(_sum(block))
    return total


@_sum_reduction
def _weight_below(row, weights, limit):
    total = _ZERO
    for i in range(len(row)):
        total += weights[i] if row[i] < limit else _ZERO
    return total


@_sum_reduction
def _weight_equal(row, weights, limit):
    total = _ZERO
    for i in range(len(row)):
        total += weights[i] if row[i] == limit else _ZERO
    return total


@_exact
def _weight_up_to(row, weights, token):
    """Weight of ``token`` and of all that sort before it: smaller, or equal with a lower index."""
    total = 0.0
    for start in range(0, len(row), BLOCK):
        stop = start + BLOCK
        total += np.float64(_weight_below(row[start:stop], weights[start:stop], row[token]))
        if start <= token:
            tied = min(stop, token + 1)
            total += np.float64(_weight_equal(row[start:tied], weights[start:tied], row[token]))
    return total


@_exact
def mask_below(row, limit):
    """Sets every logit smaller than ``limit`` to -inf."""
    for i in range(len(row)):
        row[i] = _MINUS_INF if row[i] < limit else row[i]


@_exact
def _mask_up_to(row, token):
    limit = row[token]
    mask_below(row, limit)
    for i in range(token + 1):
        row[i] = _MINUS_INF if row[i] == limit else row[i]


@_exact
def top_p_argmax(row, top_p, prefix, weights, bounds):
    """``gumbel_argmax`` over the top-p set of ``row``, which it may overwrite.

    The set is that of ``v1/sample/ops/topk_topp_sampler.py``: in ascending order (ties by index) a
    token is out while the probability up to and including it is <= 1 - top_p; the last stays.
    """
    total = exp_weights(row, row_max(row), weights)
    outside = np.float64(_ONE - top_p) * total
    token = gumbel_argmax(row, prefix, bounds)
    while _weight_up_to(row, weights, token) <= outside:
        _mask_up_to(row, token)
        survivor = gumbel_argmax(row, prefix, bounds)
        if row[survivor] == _MINUS_INF:
            break
        token = survivor
    return token


@_exact
def _count_at_least(row, limit):
    count = np.int32(0)
    for i in range(len(row)):
        count += np.int32(row[i] >= limit)
    return count


@_exact
def _sortable(bits):
    """Maps float32 bits to int32 that sort like the floats, and back: it is its own inverse."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@_exact
def top_k_limit(row, k):
    """The k-th largest logit, or a limit that just the k largest reach: bisection on the bits."""
    low = np.int64(_sortable(bits_of_float(_MINUS_INF)))
    high = np.int64(_sortable(bits_of_float(row_max(row)))) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        count = _count_at_least(row, float_of_bits(_sortable(np.int32(middle))))
        if count == k:
            return float_of_bits(_sortable(np.int32(middle)))
        if count > k:
            low = middle
        else:
            high = middle
    return float_of_bits(_sortable(np.int32(low)))


@_exact
def keep_allowed(row, token_ids, kept):
    """Sets every logit to -inf but those of ``token_ids``; ``kept`` is scratch as long."""
    for i in range(len(token_ids)):
        kept[i] = row[token_ids[i]]
    row[:] = _MINUS_INF
    for i in range(len(token_ids)):
        row[token_ids[i]] = kept[i]


@_exact
def add_bias(row, token_ids, bias):
    """row[token_ids] += bias; the ids differ."""
    for i in range(len(token_ids)):
        row[token_ids[i]] += bias[i]


@_exact
def forbid(row, token_ids):
    """row[token_ids] = -inf."""
    for i in range(len(token_ids)):
        row[token_ids[i]] = _MINUS_INF


@_exact
def apply_penalties(row, prompt_mask, output_counts, repetition, frequency, presence):
    """Repetition penalty of prompt and output tokens, then frequency and presence of output ones.

    ``prompt_mask`` has one bit per token id, ``output_counts`` one int32.
    """
    if repetition != _ONE:
        inverse = _ONE / repetition
        for word in range(len(prompt_mask)):
            first = word * 32
            bits = np.uint32(prompt_mask[word])
            for i in range(min(32, len(row) - first)):
                seen = (bits >> np.uint32(i)) & np.uint32(1) or output_counts[first + i] > 0
                logit = row[first + i]
                scaled = logit * (inverse if logit > _ZERO else repetition)
                row[first + i] = scaled if seen else logit
    for token in range(len(row)):
        count = output_counts[token]
        row[token] -= frequency * np.float32(count)
        row[token] -= presence if count > 0 else _ZERO


@_exact
def forbid_bad_words(row, token_ids, offsets, output_ids):
    """Forbids the last token of each bad word whose other tokens end ``output_ids``.

    Word w is ``token_ids[offsets[w]:offsets[w + 1]]``.
    """
    for word in range(len(offsets) - 1):
        last = offsets[word + 1] - 1
        prefix_len = last - offsets[word]
        matches = prefix_len <= len(output_ids)
        for i in range(prefix_len if matches else 0):
            output_id = output_ids[len(output_ids) - prefix_len + i]
            matches = matches and token_ids[offsets[word] + i] == output_id
        if matches:
            row[token_ids[last]] = _MINUS_INF


@_exact
def apply_temperature(row, temperature):
    """row /= temperature, correctly rounded."""
    for i in range(len(row)):
        row[i] /= temperature


@_exact
def apply_min_p(row, min_p):
    """Keeps logits of at least max + log(min_p)."""
    mask_below(row, row_max(row) + _log(min_p))


@_exact
def _must_adjust(req, position, sampling):
    return (
        sampling.num_allowed_token_ids[req] > 0
        or sampling.num_logit_bias[req] > 0
        or (sampling.num_min_stop_token_ids[req] > 0 and position + 1 < sampling.min_lens[req])
        or sampling.repetition_penalty[req] != _ONE
        or sampling.frequency_penalty[req] != _ZERO
        or sampling.presence_penalty[req] != _ZERO
        or sampling.num_bad_words[req] > 0
    )


@_exact
def _adjust(row, req, position, requests, sampling, kept):
    """Bias, penalties and bad words: all that the temperature does not scale."""
    num_allowed = sampling.num_allowed_token_ids[req]
    if num_allowed > 0:
        keep_allowed(row, sampling.allowed_token_ids[req, :num_allowed], kept)
    num_bias = sampling.num_logit_bias[req]
    add_bias(row, sampling.logit_bias_token_ids[req, :num_bias], sampling.logit_bias[req])
    if position + 1 < sampling.min_lens[req]:
        num_stop = sampling.num_min_stop_token_ids[req]
        forbid(row, sampling.min_stop_token_ids[req, :num_stop])
    repetition = sampling.repetition_penalty[req]
    frequency = sampling.frequency_penalty[req]
    presence = sampling.presence_penalty[req]
    if repetition != _ONE or frequency != _ZERO or presence != _ZERO:
        mask, counts = requests.prompt_bin_mask[req], requests.output_bin_counts[req]
        apply_penalties(row, mask, counts, repetition, frequency, presence)
    num_bad_words = sampling.num_bad_words[req]
    if num_bad_words > 0:
        output_ids = requests.all_token_ids[req, requests.prompt_len[req] : requests.total_len[req]]
        offsets = sampling.bad_word_offsets[req, : num_bad_words + 1]
        forbid_bad_words(row, sampling.bad_word_token_ids[req], offsets, output_ids)


@_exact
def _sample_row(logits, req, position, requests, sampling, row, weights, bounds):
    temperature = sampling.temperature[req]
    adjust = _must_adjust(req, position, sampling)
    if temperature == _ZERO and not adjust:
        return argmax(logits)
    for i in range(len(row)):
        row[i] = widen(logits[i])
    if adjust:
        _adjust(row, req, position, requests, sampling, bounds)
    if temperature == _ZERO:
        return argmax(row)
    if temperature != _ONE:
        apply_temperature(row, temperature)
    if sampling.min_p[req] != _ZERO:
        apply_min_p(row, sampling.min_p[req])
    if sampling.top_k[req] < len(row):
        mask_below(row, top_k_limit(row, sampling.top_k[req]))
    prefix = hash_prefix(sampling.seeds[req], position)
    if sampling.top_p[req] < _ONE:
        return top_p_argmax(row, sampling.top_p[req], prefix, weights, bounds)
    return gumbel_argmax(row, prefix, bounds)


@_exact
def sample_noisy(logits, temperature, divide, seed, position, row, bounds):
    """One token with no processing but temperature, which ``divide`` applies; 0 is greedy."""
    if temperature == _ZERO:
        return argmax(logits)
    for i in range(len(row)):
        row[i] = widen(logits[i])
    if divide:
        apply_temperature(row, temperature)
    return gumbel_argmax(row, hash_prefix(seed, position), bounds)


@_exact
def row_logprobs(logits, token_ids, row, weights, logprobs):
    """Writes the log softmax of one row of raw logits at ``token_ids``."""
    for i in range(len(row)):
        row[i] = widen(logits[i])
    top = row_max(row)
    log_total = np.float32(math.log(exp_weights(row, top, weights)))
    for i in range(len(token_ids)):
        logprobs[i] = row[token_ids[i]] - top - log_total


@_exact
def row_rank(logits, token):
    """How many logits are at least that of ``token``."""
    limit = widen(logits[token])
    rank = np.int32(0)
    for i in range(len(logits)):
        rank += np.int32(widen(logits[i]) >= limit)
    return rank


@_exact
def sample_rows(
    logits, row_stride, num_reqs, positions, rows, requests, sampling, logprobs, scratch
):
    """Writes ``rows.sampled`` of the active rows, with ``logprobs`` also those and the ranks.

    ``logits`` is flat, row b starts at ``b * row_stride``; ``scratch`` is three float32 arrays:
    two of the vocabulary's size and one of ``BLOCK``.
    """
    row, weights, bounds = scratch
    for batch_idx in range(num_reqs):
        if rows.active[batch_idx]:
            start = batch_idx * row_stride
            raw = logits[start : start + len(row)]
            req, position = rows.idx_mapping[batch_idx], positions[batch_idx]
            token = _sample_row(raw, req, position, requests, sampling, row, weights, bounds)
            rows.sampled[batch_idx] = token
            if logprobs:
                sampled = rows.sampled[batch_idx : batch_idx + 1]
                row_logprobs(raw, sampled, row, weights, rows.logprobs[batch_idx : batch_idx + 1])
                rows.ranks[batch_idx] = row_rank(raw, token)
