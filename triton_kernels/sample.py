"""The fused step, first launch: one read of the logits gives each row its token.

Grid (NUM_SPLITS, num_reqs). Each program adjusts, scales and scores a block of one row; the last to
arrive takes the winner (``winner.py``, with the memory order) and advances the row, unless the row
has top-k or top-p: then ``truncate.py`` does. With HANDS_OVER somebody else's kernels truncate such
rows (``adjusted`` by ``limit_k`` and ``limit_p`` of the scratch), and ``draw.py`` advances them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.adjust import adjust, must_adjust
from fusedstep.kernels.noise import hash_prefix
from fusedstep.kernels.rows import advance
from fusedstep.kernels.winner import (
    arrive,
    leave_winner,
    load_splits,
    log_total,
    row_winner,
    winner_from,
)

BUCKET = tl.constexpr(128)


@triton.jit
def is_truncated(req, sampling, VOCAB_SIZE: tl.constexpr):
    """True if top-k or top-p can change the token: not in a greedy row."""
    has_limit = (tl.load(sampling.top_k + req) < VOCAB_SIZE) | (tl.load(sampling.top_p + req) < 1.0)
    return has_limit & (tl.load(sampling.temperature + req) != 0.0)


@triton.jit(do_not_specialize=["logprobs", "advances"])
def sample_kernel(
    logits_ptr,  # [num_reqs, VOCAB_SIZE]
    logits_stride,
    logprobs,  # 1: logprob and rank of the sampled tokens
    advances,  # 1: the rows advance, 0: tokens only
    rows,
    requests,
    sampling,
    stop,
    inputs,
    scratch,
    strides,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,  # next power of two
    BUCKETS: tl.constexpr,  # power of two, at least NUM_SPLITS * BLOCK_V / BUCKET
    BLOCK_SIZES: tl.constexpr,  # per KV cache group
    ADJUST: tl.constexpr,  # may a row have bias, penalties or bad words?
    RESTRICT: tl.constexpr,  # may a row have min-p, top-k or top-p?
    HANDS_OVER: tl.constexpr,  # somebody else applies top-k and top-p
):
    split = tl.program_id(0)
    batch_idx = tl.program_id(1).to(tl.int64)
    logits_row = logits_ptr + batch_idx * logits_stride
    token_ids = split * BLOCK_V + tl.arange(0, BLOCK_V)
    in_vocab = token_ids < VOCAB_SIZE
    # These loads need only batch_idx: all are under way before the first is used.
    raw = tl.load(logits_row + token_ids, mask=in_vocab, other=float("-inf"))
    req = tl.load(rows.idx_mapping + batch_idx)
    position = tl.load(inputs.positions + batch_idx)
    active = tl.load(rows.active + batch_idx)
    tl.debug_barrier()  # compiler: it moved the loads above behind the exit, one wait more
    if active == 0:
        if HANDS_OVER:
            _store_limits(VOCAB_SIZE, 1.0, split, batch_idx, scratch)
        if (logprobs != 0) & (split == 0):
            tl.store(scratch.sampled_logits + batch_idx, float("nan"))
        return
    temperature = tl.load(sampling.temperature + req)
    is_handed_over = False
    if HANDS_OVER:
        is_handed_over = is_truncated(req, sampling, VOCAB_SIZE)
        top_k = tl.where(is_handed_over, tl.load(sampling.top_k + req), VOCAB_SIZE)
        top_p = tl.where(is_handed_over, tl.load(sampling.top_p + req), 1.0)
        _store_limits(top_k, top_p, split, batch_idx, scratch)
    is_adjusted = False
    if ADJUST:
        is_adjusted = must_adjust(req, position, sampling)
    prefix = hash_prefix(tl.load(sampling.seeds + req), position)
    adjusted_row = scratch.adjusted + batch_idx * VOCAB_SIZE

    logits = raw.to(tl.float32)
    offset = batch_idx * NUM_SPLITS + split
    if logprobs:
        _store_weight(logits, scratch.split_max + offset, scratch.split_weights + offset)
    if is_adjusted:
        logits = adjust(
            logits,
            logits_row,
            adjusted_row,
            split * BLOCK_V,
            req,
            position,
            requests,
            sampling,
            strides,
            VOCAB_SIZE,
            BLOCK_V,
        )
    if is_handed_over:
        _hand_over(
            logits / temperature,
            token_ids,
            offset,
            adjusted_row,
            batch_idx,
            tl.load(sampling.min_p + req),
            scratch,
            VOCAB_SIZE,
            NUM_SPLITS,
            SPLITS,
        )
        return
    leave_winner(logits, split * BLOCK_V, temperature, prefix, offset, scratch, VOCAB_SIZE)
    restricted = False
    if RESTRICT:
        min_p = tl.load(sampling.min_p + req)
        truncated = is_truncated(req, sampling, VOCAB_SIZE)
        restricted = truncated | ((min_p != 0.0) & (temperature != 0.0))
    if restricted:
        scaled = tl.reshape(logits / temperature, [BLOCK_V // BUCKET, BUCKET])
        bucket_max = tl.max(scaled, axis=1)
        bucket_ids = split * (BLOCK_V // BUCKET) + tl.arange(0, BLOCK_V // BUCKET)
        tl.store(scratch.bucket_max + batch_idx * BUCKETS + bucket_ids, bucket_max)

    if not arrive(batch_idx, NUM_SPLITS, scratch):
        return
    row = (logits_row, adjusted_row, is_adjusted, temperature, prefix)
    if RESTRICT and restricted:
        token = _restrict(
            min_p,
            batch_idx,
            req,
            row,
            sampling,
            scratch,
            VOCAB_SIZE,
            BLOCK_V,
            NUM_SPLITS,
            SPLITS,
            BUCKETS,
        )
    else:
        token = row_winner(batch_idx, row, scratch, VOCAB_SIZE, BLOCK_V, NUM_SPLITS, SPLITS)
    if RESTRICT and truncated:
        return
    finish(
        token,
        logprobs,
        advances,
        batch_idx,
        req,
        logits_row,
        rows,
        requests,
        stop,
        inputs,
        scratch,
        strides,
        VOCAB_SIZE,
        NUM_SPLITS,
        SPLITS,
        BLOCK_SIZES,
    )


@triton.jit
def _store_limits(top_k, top_p, split, batch_idx, scratch):
    """Store a row's top-k and top-p for those who apply them; one program of the row does it."""
    if split == 0:
        tl.store(scratch.limit_k + batch_idx, top_k)
        tl.store(scratch.limit_p + batch_idx, top_p)


@triton.jit
def _hand_over(
    logits,  # [BLOCK_V] float32, scaled
    token_ids,
    offset,  # of this split in the scratch
    adjusted_row,
    batch_idx,
    min_p,
    scratch,
    VOCAB_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store the scaled logits of a row for those who truncate it, after min-p."""
    tl.debug_barrier()  # ``adjust`` may have stored or still read these entries in other threads
    tl.store(adjusted_row + token_ids, logits, mask=token_ids < VOCAB_SIZE)
    if min_p != 0.0:
        tl.store(scratch.best_scores + offset, tl.max(logits, axis=0))
        if arrive(batch_idx, NUM_SPLITS, scratch):
            split_max = load_splits(
                scratch.best_scores, batch_idx, float("-inf"), NUM_SPLITS, SPLITS
            )
            _mask_below(tl.max(split_max, axis=0) + tl.log(min_p), adjusted_row, VOCAB_SIZE)


@triton.jit
def _mask_below(limit, adjusted_row, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr = 4096):
    for start in range(0, VOCAB_SIZE, BLOCK):
        token_ids = start + tl.arange(0, BLOCK)
        logits = tl.load(adjusted_row + token_ids, mask=token_ids < VOCAB_SIZE, other=float("inf"))
        tl.debug_barrier()  # other threads may still load these entries
        tl.store(adjusted_row + token_ids, float("-inf"), mask=logits < limit)


@triton.jit
def _store_weight(logits, max_ptr, weight_ptr):
    """Store max and sum(exp(logits - max)) of a block."""
    block_max = tl.max(logits, axis=0)
    tl.store(max_ptr, block_max)
    weights = tl.where(logits == float("-inf"), 0.0, tl.exp(logits - block_max))
    tl.store(weight_ptr, tl.sum(weights, axis=0))


@triton.jit
def _restrict(
    min_p,
    batch_idx,
    req,
    row,
    sampling,
    scratch,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """The winner of a row among what min-p keeps; also stores what truncate.py starts from."""
    bucket_ids = tl.arange(0, BUCKETS)
    # .cg: written by other SMs, read once (see load_splits).
    bucket_max = tl.load(
        scratch.bucket_max + batch_idx * BUCKETS + bucket_ids,
        mask=bucket_ids < NUM_SPLITS * (BLOCK_V // BUCKET),
        other=float("-inf"),
        cache_modifier=".cg",
    )
    row_max = tl.max(bucket_max, axis=0)
    floor = float("-inf")
    if min_p != 0.0:
        floor = row_max + tl.log(min_p)
    token, value, _ = winner_from(
        floor, 0, batch_idx, row, scratch, VOCAB_SIZE, BLOCK_V, NUM_SPLITS, SPLITS
    )
    kth_bound = _kth_bound(bucket_max, row_max, tl.load(sampling.top_k + req))
    bound = tl.maximum(floor, kth_bound)
    tl.store(scratch.row_max + batch_idx, row_max)
    tl.store(scratch.floors + batch_idx, floor)
    tl.store(scratch.bounds + batch_idx, bound)
    tl.store(scratch.winners + batch_idx, token)
    tl.store(scratch.winner_values + batch_idx, value)
    tl.store(scratch.num_candidates + batch_idx, 0)
    return token


@triton.jit
def _kth_bound(bucket_max, row_max, k):
    """A lower bound of the row's k-th largest logit that few more than k logits reach.

    The k-th largest of the buckets' maxima is one; bisection comes close to it from below.
    """
    finite = bucket_max > float("-inf")
    low = tl.min(tl.where(finite, bucket_max, row_max), axis=0)
    low = tl.where(tl.sum(finite.to(tl.int32), axis=0) >= k, low, float("-inf"))
    high = row_max
    if low > float("-inf"):
        for _ in range(12):
            middle = 0.5 * low + 0.5 * high
            enough = tl.sum((bucket_max >= middle).to(tl.int32), axis=0) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    return low


@triton.jit
def finish(
    token,
    logprobs,
    advances,
    batch_idx,
    req,
    logits_row,
    rows,
    requests,
    stop,
    inputs,
    scratch,
    strides,
    VOCAB_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
):
    """Record the row's token and advance the row. Called by its last program."""
    tl.store(rows.sampled + batch_idx, token.to(tl.int64))
    if logprobs:
        split_max = load_splits(scratch.split_max, batch_idx, float("-inf"), NUM_SPLITS, SPLITS)
        weights = load_splits(scratch.split_weights, batch_idx, 0.0, NUM_SPLITS, SPLITS)
        row_max, rest = log_total(split_max, weights)
        value = tl.load(logits_row + token).to(tl.float32)
        tl.store(rows.logprobs + batch_idx, value - row_max - rest)
        tl.store(rows.ranks + batch_idx, 0)  # rank.py counts
        tl.store(scratch.sampled_logits + batch_idx, value)
    if advances:
        advance(token, batch_idx, req, rows, requests, stop, inputs, strides, BLOCK_SIZES)
