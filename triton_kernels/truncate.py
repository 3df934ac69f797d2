"""The fused step, second launch: rows with top-k or top-p. No sort of the vocabulary.

It keeps what a stable sort would, as stock vLLM on a CPU does. On a GPU stock keeps other ones of
equal logits, so there its own kernels take this launch's place (``draw.py``).

Grid (num_parts, num_reqs). ``sample.py`` has left each such row the winner among the tokens that
min-p keeps. ``winner.py`` says how the programs of a row are ordered.

*top-p alone*: the winner of all tokens is also the winner of the top-p set if it is in that set. So
the weight of the winner and of all tokens before it is summed. If that is too small for top-p, all
of them are dropped, and the winner of the rest is checked in the same way.

*top-k*: the k-th largest maximum of the vocabulary's buckets bounds the k-th largest logit from
below, so the few tokens that reach the bound are listed and sorted, and the winner is taken from
those that top-k, then top-p keep. If the list is too long (flat rows, very large k) the k-th
largest logit is found by bisection over the row, and top-p goes on as above.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.adjust import must_adjust
from fusedstep.kernels.noise import gumbel_noise, hash_prefix
from fusedstep.kernels.sample import BUCKET, finish, is_truncated
from fusedstep.kernels.winner import arrive, first_best, scaled_logits, winner_from

PASS_BLOCK = tl.constexpr(4096)
OTHERS = tl.constexpr(8)


@triton.jit(do_not_specialize=["logprobs", "advances", "num_parts", "part_size"])
def truncate_kernel(
    logits_ptr,  # [num_reqs, VOCAB_SIZE]
    logits_stride,
    logprobs,
    advances,
    part_size,  # token ids per program
    num_parts,
    rows,
    requests,
    sampling,
    stop,
    inputs,
    scratch,
    strides,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,  # of the first launch, like NUM_SPLITS and SPLITS
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_SIZES: tl.constexpr,
):
    part = tl.program_id(0)
    batch_idx = tl.program_id(1).to(tl.int64)
    if tl.load(rows.active + batch_idx) == 0:
        return
    req = tl.load(rows.idx_mapping + batch_idx)
    if not is_truncated(req, sampling, VOCAB_SIZE):
        return
    position = tl.load(inputs.positions + batch_idx)
    temperature = tl.load(sampling.temperature + req)
    top_k = tl.load(sampling.top_k + req)
    top_p = tl.load(sampling.top_p + req)
    prefix = hash_prefix(tl.load(sampling.seeds + req), position)
    logits_row = logits_ptr + batch_idx * logits_stride
    adjusted_row = scratch.adjusted + batch_idx * VOCAB_SIZE
    is_adjusted = must_adjust(req, position, sampling)
    row = (logits_row, adjusted_row, is_adjusted, temperature, prefix)
    row_max = tl.load(scratch.row_max + batch_idx)
    floor = tl.load(scratch.floors + batch_idx)
    bound = tl.load(scratch.bounds + batch_idx)
    token = tl.load(scratch.winners + batch_idx)
    value = tl.load(scratch.winner_values + batch_idx)

    # A whole number of buckets: the compiler must know that a part's loads can be wide.
    first = part * (part_size // BUCKET) * BUCKET
    last = tl.minimum(first + part_size, VOCAB_SIZE)
    if top_k < VOCAB_SIZE:
        _list_candidates(bound, first, last, batch_idx, row, scratch, VOCAB_SIZE, CANDIDATES)
    else:
        weight, up_to = _weights(floor, value, token, row_max, first, last, row, VOCAB_SIZE)
        offset = batch_idx * NUM_SPLITS + part
        tl.store(scratch.weights + offset, weight)
        tl.store(scratch.weights_up_to + offset, up_to)

    if not arrive(batch_idx, num_parts, scratch):
        return
    if top_k < VOCAB_SIZE:
        # .cg: other SMs have added to it, in L2 (see load_splits).
        num_candidates = tl.load(scratch.num_candidates + batch_idx, cache_modifier=".cg")
        if num_candidates <= CANDIDATES:
            token = _sample_listed(
                num_candidates,
                top_k,
                top_p,
                row_max,
                batch_idx,
                prefix,
                scratch,
                VOCAB_SIZE,
                CANDIDATES,
            )
        else:
            threshold = bound
            if top_k < num_candidates:
                threshold = _kth_largest(top_k, bound, row_max, row, VOCAB_SIZE)
            token, value, _ = winner_from(
                threshold, 0, batch_idx, row, scratch, VOCAB_SIZE, BLOCK_V, NUM_SPLITS, SPLITS
            )
            if top_p < 1.0:
                total, up_to = _weights(
                    threshold, value, token, row_max, 0, VOCAB_SIZE, row, VOCAB_SIZE
                )
                token = _into_top_p(
                    token,
                    value,
                    total,
                    up_to,
                    threshold,
                    top_p,
                    row_max,
                    batch_idx,
                    row,
                    scratch,
                    VOCAB_SIZE,
                    BLOCK_V,
                    NUM_SPLITS,
                    SPLITS,
                )
    else:
        weights = _load_parts(scratch.weights, batch_idx, num_parts, NUM_SPLITS, SPLITS)
        up_to = _load_parts(scratch.weights_up_to, batch_idx, num_parts, NUM_SPLITS, SPLITS)
        token = _into_top_p(
            token,
            value,
            tl.sum(weights, axis=0),
            tl.sum(up_to, axis=0),
            floor,
            top_p,
            row_max,
            batch_idx,
            row,
            scratch,
            VOCAB_SIZE,
            BLOCK_V,
            NUM_SPLITS,
            SPLITS,
        )
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
def _load_parts(ptr, batch_idx, num_parts, NUM_SPLITS: tl.constexpr, SPLITS: tl.constexpr):
    """One value per part of a row, zero after the last; there are no more parts than splits."""
    part = tl.arange(0, SPLITS)
    part_ptr = ptr + batch_idx * NUM_SPLITS + part
    # .cg: written by other SMs, read once (see load_splits).
    return tl.load(part_ptr, mask=part < num_parts, other=0.0, cache_modifier=".cg")


@triton.jit
def _weights(floor, value, token, row_max, first, last, row, VOCAB_SIZE: tl.constexpr):
    """Two sums of exp(logit - row_max) over the tokens from ``first`` to ``last``.

    The first is over all that ``floor`` keeps, the second over those of them up to (value, token).
    """
    total = tl.zeros([PASS_BLOCK], dtype=tl.float32)
    up_to = tl.zeros([PASS_BLOCK], dtype=tl.float32)
    for start in range(first, last, PASS_BLOCK):
        token_ids = start + tl.arange(0, PASS_BLOCK)
        logits = scaled_logits(row, token_ids, VOCAB_SIZE)
        kept = (logits >= floor) & (token_ids < VOCAB_SIZE)
        weights = tl.where(kept, tl.exp(logits - row_max), 0.0)
        before = (logits < value) | ((logits == value) & (token_ids <= token))
        total += weights
        up_to += tl.where(before, weights, 0.0)
    return tl.sum(total, axis=0), tl.sum(up_to, axis=0)


@triton.jit
def _into_top_p(
    token,
    value,
    total,
    up_to,
    floor,
    top_p,
    row_max,
    batch_idx,
    row,
    scratch,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The winner of the top-p set, from the winner of all that ``floor`` keeps.

    A token is out while the weight of it and of all before it is at most (1 - top_p) of the total;
    the last one stays (``v1/sample/ops/topk_topp_sampler.py``).
    """
    outside = (1.0 - top_p) * total
    searching = up_to <= outside
    while searching:
        next_token, next_value, score = winner_from(
            value, token + 1, batch_idx, row, scratch, VOCAB_SIZE, BLOCK_V, NUM_SPLITS, SPLITS
        )
        searching = score > float("-inf")
        if searching:
            token = next_token
            value = next_value
            _, up_to = _weights(floor, value, token, row_max, 0, VOCAB_SIZE, row, VOCAB_SIZE)
            searching = up_to <= outside
    return token


@triton.jit
def _list_candidates(
    bound,
    first,
    last,
    batch_idx,
    row,
    scratch,
    VOCAB_SIZE: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Append the tokens that reach ``bound`` to the row's list; beyond its end only count them."""
    for start in range(first, last, PASS_BLOCK):
        token_ids = start + tl.arange(0, PASS_BLOCK)
        logits = scaled_logits(row, token_ids, VOCAB_SIZE)
        chosen = (logits >= bound) & (token_ids < VOCAB_SIZE)
        count = tl.sum(chosen.to(tl.int32), axis=0)
        if count > 0:
            # Reserves entries of the list. Relaxed: nobody reads them before ``arrive``.
            listed = tl.atomic_add(scratch.num_candidates + batch_idx, count, sem="relaxed")
            entry = listed + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            fits = chosen & (entry < CANDIDATES)
            offset = batch_idx * CANDIDATES + entry
            tl.store(scratch.candidates + offset, token_ids, mask=fits)
            tl.store(scratch.candidate_values + offset, logits, mask=fits)


@triton.jit
def _sample_listed(
    num_candidates,
    top_k,
    top_p,
    row_max,
    batch_idx,
    prefix,
    scratch,
    VOCAB_SIZE: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The winner of a row whose top-k tokens are all in its list."""
    _sort_listed(num_candidates, batch_idx, scratch, CANDIDATES)
    tl.debug_barrier()  # below a thread reads what other threads have stored
    rank = tl.arange(0, CANDIDATES)
    listed = rank < num_candidates
    first = batch_idx * CANDIDATES
    token_ids = tl.load(scratch.sorted + first + rank, mask=listed, other=VOCAB_SIZE - 1)
    values = tl.load(scratch.sorted_values + first + rank, mask=listed, other=float("-inf"))
    kept = listed
    if top_k <= num_candidates:
        kept = kept & (values >= tl.load(scratch.sorted_values + first + top_k - 1))
    if top_p < 1.0:
        weights = tl.where(kept, tl.exp(values - row_max), 0.0)
        up_to = tl.cumsum(weights, axis=0, reverse=True)
        outside = up_to <= (1.0 - top_p) * tl.sum(weights, axis=0)
        kept = kept & ((outside == 0) | (rank == 0))
    scores = tl.where(kept, values + gumbel_noise(prefix, token_ids), float("-inf"))
    _, token = first_best(scores, tl.where(kept, token_ids, VOCAB_SIZE - 1), VOCAB_SIZE)
    return token


@triton.jit
def _sort_listed(num_candidates, batch_idx, scratch, CANDIDATES: tl.constexpr):
    """Sort the list, largest first: a token's rank is the number of tokens that come before it."""
    entry = tl.arange(0, CANDIDATES)
    listed = entry < num_candidates
    tokens_ptr = scratch.candidates + batch_idx * CANDIDATES
    values_ptr = scratch.candidate_values + batch_idx * CANDIDATES
    # .cg, here and in the loop: written by other SMs (see load_splits).
    token_ids = tl.load(tokens_ptr + entry, mask=listed, other=0, cache_modifier=".cg")
    values = tl.load(values_ptr + entry, mask=listed, other=float("-inf"), cache_modifier=".cg")
    rank = tl.zeros([CANDIDATES], dtype=tl.int32)
    for start in range(0, num_candidates, OTHERS):
        other = start + tl.arange(0, OTHERS)
        valid = other < num_candidates
        other_ids = tl.load(tokens_ptr + other, mask=valid, other=-1, cache_modifier=".cg")
        other_values = tl.load(
            values_ptr + other, mask=valid, other=float("-inf"), cache_modifier=".cg"
        )
        larger = other_values[None, :] > values[:, None]
        tied = other_values[None, :] == values[:, None]
        before = larger | (tied & (other_ids[None, :] > token_ids[:, None]))
        rank += tl.sum(before.to(tl.int32), axis=1)
    first = batch_idx * CANDIDATES
    tl.store(scratch.sorted + first + rank, token_ids, mask=listed)
    tl.store(scratch.sorted_values + first + rank, values, mask=listed)


@triton.jit
def _sortable(bits):
    """Maps float32 bits (int32) to int32 that sort like the floats, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_largest(k, bound, row_max, row, VOCAB_SIZE: tl.constexpr):
    """The row's k-th largest logit, or a limit that just the k largest reach.

    Bisection on the bits, between ``bound``, which more than k logits reach, and ``row_max``.
    """
    low = _sortable(bound.to(tl.int32, bitcast=True)).to(tl.int64)
    high = _sortable(row_max.to(tl.int32, bitcast=True)).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        limit = _sortable(middle.to(tl.int32)).to(tl.float32, bitcast=True)
        count = 0
        for start in range(0, VOCAB_SIZE, PASS_BLOCK):
            token_ids = start + tl.arange(0, PASS_BLOCK)
            logits = scaled_logits(row, token_ids, VOCAB_SIZE)
            reached = (logits >= limit) & (token_ids < VOCAB_SIZE)
            count += tl.sum(reached.to(tl.int32), axis=0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > k, high, tl.where(count == k, middle + 1, middle))
    return _sortable(low.to(tl.int32)).to(tl.float32, bitcast=True)
