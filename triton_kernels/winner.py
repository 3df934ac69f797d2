"""Argmax of a row across programs: each leaves the winner of its split, the last one reduces.

A split's winner is the likely one: noise is drawn nearly (``near_scores``) for all tokens, exactly
for the winners. With it a split leaves a bound of the scores of its other tokens, and where that is
not below the best exact score, the split is scored again, exactly. So tokens are those of exact
noise. A greedy row has no noise: its winners are certain.

The order of a row's tokens is that of vLLM's sorted top-p: by logit, ties by token id. A *cut*
(value, token id) keeps the token itself and all after it; ``winner_from`` is the argmax of those.
``row`` is the tuple (logits_row, adjusted_row, is_adjusted, temperature, noise prefix).

Memory order, for every kernel that calls ``arrive``:

* Inputs (logits, parameters, ``active``, ``positions``): every program of a row reads them before
  it arrives. Only the last program overwrites any of them, after all have arrived.
* Scratch with an entry per split (attention: per piece), and ``adjusted``: each entry has one
  writer, the program of that split. The last program reads all of them, after ``arrive``, which
  releases each writer's stores and acquires them for the reader.
* The candidate list of ``truncate.py``: programs reserve disjoint entries by an atomic add on its
  length, then it is like scratch per split.
* Scratch with an entry per row: written by the last program of ``sample_kernel``, read by
  ``truncate_kernel``. The end of a launch orders them, as it orders all that ``advance`` writes
  before the next step. (Programmatic dependent launch would not; it is off.)
* ``adjusted``, ``limit_k`` and ``limit_p`` of rows that are handed over (``sample.py``): written in
  one launch, changed in those of somebody else, read in that of ``draw_kernel``.
* ``sampled_logits``: written by one program of a row, read by ``rank_kernel`` in a later launch, in
  which all add to ``ranks`` by atomics; nobody reads that before the launch has ended.
* ``arrivals``: counted by atomics, reset by the last program, zero between launches.
* ``num_active``: rows subtract from it by atomics; nobody reads it before the launch has ended.
* Within a program a thread is sure to see its own stores only. A barrier, with its reason, stands
  between where it reads another thread's or overwrites what another thread still has to read.

``tests/races`` holds all kernels to this, and docs/memory-order.md says what that proves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.noise import gumbel_noise, near_scores, score_bound
from fusedstep.kernels.target import is_gfx9

NO_SCORE = tl.constexpr(float("-inf"))
CHUNK = tl.constexpr(1024)  # tokens that are scored again at a time


@triton.jit
def scaled_logits(row, token_ids, VOCAB_SIZE: tl.constexpr, SCALED: tl.constexpr = False):
    """Logits after adjustment and temperature, float32; -inf outside the vocabulary."""
    logits_row, adjusted_row, is_adjusted, temperature, _ = row
    in_vocab = token_ids < VOCAB_SIZE
    if is_adjusted:
        logits = tl.load(adjusted_row + token_ids, mask=in_vocab, other=float("-inf"))
    else:
        logits = tl.load(logits_row + token_ids, mask=in_vocab, other=float("-inf")).to(tl.float32)
    if SCALED:
        return logits
    return logits / temperature


@triton.jit
def arrive(batch_idx, num_programs, scratch):
    """True in the last of a row's programs; what the others have written is then visible to it."""
    # The atomic is one thread's: all threads of this program must have stored what it releases.
    if is_gfx9():
        # There a barrier waits for no store, and a release for those of its own wave only: other
        # waves' stores might reach memory after the atomic. So each wave waits for its own.
        tl.inline_asm_elementwise("s_waitcnt vmcnt(0)", "=v", [], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    # Release: this program's stores. Acquire: those of all that arrived before. Every thread gets
    # the count through shared memory, behind a barrier, so that their later loads are ordered too.
    arrived = tl.atomic_add(scratch.arrivals + batch_idx, 1, sem="acq_rel")
    is_last = arrived == num_programs - 1
    if is_last:
        # A plain store: no program of this launch counts any more.
        tl.store(scratch.arrivals + batch_idx, 0)
    return is_last


@triton.jit
def first_best(scores, token_ids, VOCAB_SIZE: tl.constexpr):
    """Best score, and the smallest token id that has it (a token in any case)."""
    best = tl.max(scores, axis=0)
    return best, tl.min(tl.where(scores == best, token_ids, VOCAB_SIZE - 1), axis=0)


@triton.jit
def leave_winner(logits, first, temperature, prefix, offset, scratch, VOCAB_SIZE: tl.constexpr):
    """Store the winner of a split whose logits are adjusted, not scaled; ``offset`` is the split's.

    Of a greedy row with its score, of others with the best near score of the other tokens.
    """
    BLOCK_V: tl.constexpr = logits.shape[0]
    token_ids = first + tl.arange(0, BLOCK_V)
    if temperature != 0.0:
        # The better and the worse of each two: half as many are left to look through.
        scores = near_scores(logits, temperature, prefix, token_ids)
        left, right = tl.split(tl.reshape(scores, [BLOCK_V // 2, 2]))
        left_ids = first + 2 * tl.arange(0, BLOCK_V // 2)
        better_ids = tl.where(right > left, left_ids + 1, left_ids)
        better = tl.maximum(left, right)
        token = first_best(better, better_ids, VOCAB_SIZE)[1]
        others = tl.where(better_ids == token, tl.minimum(left, right), better)
        tl.store(scratch.others_best + offset, tl.max(others, axis=0))
    else:
        score, token = first_best(logits, token_ids, VOCAB_SIZE)
        tl.store(scratch.best_scores + offset, score)
    tl.store(scratch.best_tokens + offset, token)


@triton.jit
def load_splits(ptr, batch_idx, other, NUM_SPLITS: tl.constexpr, SPLITS: tl.constexpr):
    """One value per split of a row; SPLITS is a power of two, ``other`` fills the rest."""
    split = tl.arange(0, SPLITS)
    split_ptr = ptr + batch_idx * NUM_SPLITS + split
    # .cg: other SMs have just written these to L2, and they are read once: no use for L1.
    return tl.load(split_ptr, mask=split < NUM_SPLITS, other=other, cache_modifier=".cg")


@triton.jit
def log_total(split_max, weights):
    """Log-sum-exp of a row as (max, log of the rest), from the max and the weight of each split."""
    row_max = tl.max(split_max, axis=0)
    parts = tl.where(split_max == float("-inf"), 0.0, weights * tl.exp(split_max - row_max))
    return row_max, tl.log(tl.sum(parts, axis=0))


@triton.jit
def row_winner(
    batch_idx,
    row,
    scratch,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr = False,
):
    """The winner among all tokens of a row; with SCALED its logits are divided already."""
    temperature = row[3]
    if temperature != 0.0:
        found = winner_from(
            float("-inf"),
            0,
            batch_idx,
            row,
            scratch,
            VOCAB_SIZE,
            BLOCK_V,
            NUM_SPLITS,
            SPLITS,
            SCALED,
        )
        token = found[0]
    else:
        scores = load_splits(scratch.best_scores, batch_idx, NO_SCORE, NUM_SPLITS, SPLITS)
        token_ids = load_splits(scratch.best_tokens, batch_idx, VOCAB_SIZE - 1, NUM_SPLITS, SPLITS)
        token = first_best(scores, token_ids, VOCAB_SIZE)[1]
    return token


@triton.jit
def winner_from(
    cut_value,
    cut_token,
    batch_idx,
    row,
    scratch,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr = False,
):
    """Token, scaled logit and score of the winner among the tokens that the cut keeps.

    The row has a temperature. A split is scored again while the bound of the scores of its other
    tokens can still win: few are. The score is NO_SCORE when the cut keeps nothing.
    """
    token_ids = load_splits(scratch.best_tokens, batch_idx, VOCAB_SIZE - 1, NUM_SPLITS, SPLITS)
    others = load_splits(scratch.others_best, batch_idx, NO_SCORE, NUM_SPLITS, SPLITS)
    split_ids = tl.arange(0, SPLITS)
    is_split = split_ids < NUM_SPLITS
    bounds = tl.where(is_split, score_bound(others, row[3]), NO_SCORE)
    values, scores = _scored(cut_value, cut_token, token_ids, is_split, row, VOCAB_SIZE, SCALED)
    score, token = first_best(scores, token_ids, VOCAB_SIZE)
    value = _value_of(token, values, scores, token_ids)

    STEP: tl.constexpr = BLOCK_V if BLOCK_V < CHUNK else CHUNK
    bound = tl.max(bounds, axis=0)
    while (bound >= score) & (bound > NO_SCORE):
        split = tl.min(tl.where(bounds == bound, split_ids, SPLITS), axis=0)
        for start in range(0, BLOCK_V, STEP):
            block = split * BLOCK_V + start + tl.arange(0, STEP)
            block_values, block_scores = _scored(
                cut_value, cut_token, block, block < VOCAB_SIZE, row, VOCAB_SIZE, SCALED
            )
            block_score, block_token = first_best(block_scores, block, VOCAB_SIZE)
            better = (block_score > score) | ((block_score == score) & (block_token < token))
            better = better & (block_score > NO_SCORE)
            block_value = _value_of(block_token, block_values, block_scores, block)
            score = tl.where(better, block_score, score)
            token = tl.where(better, block_token, token)
            value = tl.where(better, block_value, value)
        bounds = tl.where(split_ids == split, NO_SCORE, bounds)
        bound = tl.max(bounds, axis=0)
    return token, value, score


@triton.jit
def _scored(
    cut_value,
    cut_token,
    token_ids,
    valid,
    row,
    VOCAB_SIZE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Scaled logits and exact scores of tokens; NO_SCORE of those that the cut leaves out."""
    values = scaled_logits(row, token_ids, VOCAB_SIZE, SCALED)
    kept = (values > cut_value) | ((values == cut_value) & (token_ids >= cut_token))
    return values, tl.where(kept & valid, values + gumbel_noise(row[4], token_ids), NO_SCORE)


@triton.jit
def _value_of(token, values, scores, token_ids):
    found = (token_ids == token) & (scores > NO_SCORE)
    return tl.max(tl.where(found, values, float("-inf")), axis=0)
