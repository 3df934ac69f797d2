"""Argmax of a row across programs: each leaves the winner of its split, the last one reduces.

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
* ``arrivals``: counted by atomics, reset by the last program, zero between launches.
* ``num_active``: rows subtract from it by atomics; nobody reads it before the launch has ended.
* Within a program a thread is sure to see its own stores only. A barrier, with its reason, stands
  between where it reads another thread's or overwrites what another thread still has to read.

``tests/races`` holds all kernels to this, and docs/memory-order.md says what that proves.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.jit import constexpr_function

from fusedstep.kernels.noise import gumbel_noise

NO_SCORE = tl.constexpr(float("-inf"))


@constexpr_function
def _is_gfx9():
    target = tl.target_info.current_target()
    return target is not None and target.backend == "hip" and target.arch.startswith("gfx9")


@triton.jit
def scaled_logits(row, token_ids, VOCAB_SIZE: tl.constexpr):
    """Logits after adjustment and temperature, float32; -inf outside the vocabulary."""
    logits_row, adjusted_row, is_adjusted, temperature, _ = row
    in_vocab = token_ids < VOCAB_SIZE
    if is_adjusted:
        logits = tl.load(adjusted_row + token_ids, mask=in_vocab, other=float("-inf"))
    else:
        logits = tl.load(logits_row + token_ids, mask=in_vocab, other=float("-inf")).to(tl.float32)
    return logits / temperature


@triton.jit
def arrive(batch_idx, num_programs, scratch):
    """True in the last of a row's programs; what the others have written is then visible to it."""
    # The atomic is one thread's: all threads of this program must have stored what it releases.
    if _is_gfx9():
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
    scratch,
    VOCAB_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The winner among all tokens of a row."""
    scores = load_splits(scratch.best_scores, batch_idx, NO_SCORE, NUM_SPLITS, SPLITS)
    token_ids = load_splits(scratch.best_tokens, batch_idx, VOCAB_SIZE - 1, NUM_SPLITS, SPLITS)
    _, token = first_best(scores, token_ids, VOCAB_SIZE)
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
):
    """Token, scaled logit and score of the winner among the tokens that the cut keeps.

    A split whose winner is kept is done. The other splits are scored again while the score of
    their winner, which bounds that of their kept tokens, can still win: mostly one is. The score is
    NO_SCORE when the cut keeps nothing.
    """
    scores = load_splits(scratch.best_scores, batch_idx, NO_SCORE, NUM_SPLITS, SPLITS)
    token_ids = load_splits(scratch.best_tokens, batch_idx, VOCAB_SIZE - 1, NUM_SPLITS, SPLITS)
    values = load_splits(scratch.best_values, batch_idx, float("-inf"), NUM_SPLITS, SPLITS)
    kept = (values > cut_value) | ((values == cut_value) & (token_ids >= cut_token))
    score, token = first_best(tl.where(kept, scores, NO_SCORE), token_ids, VOCAB_SIZE)
    value = tl.max(tl.where(kept & (token_ids == token), values, float("-inf")), axis=0)

    split_ids = tl.arange(0, SPLITS)
    bounds = tl.where(kept, NO_SCORE, scores)
    bound = tl.max(bounds, axis=0)
    while (bound >= score) & (bound > NO_SCORE):
        split = tl.min(tl.where(bounds == bound, split_ids, SPLITS), axis=0)
        block = split * BLOCK_V + tl.arange(0, BLOCK_V)
        logits = scaled_logits(row, block, VOCAB_SIZE)
        in_cut = (logits > cut_value) | ((logits == cut_value) & (block >= cut_token))
        _, _, _, _, prefix = row
        noisy = tl.where(
            in_cut & (block < VOCAB_SIZE), logits + gumbel_noise(prefix, block), NO_SCORE
        )
        block_score, block_token = first_best(noisy, block, VOCAB_SIZE)
        better = (block_score > score) | ((block_score == score) & (block_token < token))
        better = better & (block_score > NO_SCORE)
        block_value = tl.max(tl.where(block == block_token, logits, float("-inf")), axis=0)
        score = tl.where(better, block_score, score)
        token = tl.where(better, block_token, token)
        value = tl.where(better, block_value, value)
        bounds = tl.where(split_ids == split, NO_SCORE, bounds)
        bound = tl.max(bounds, axis=0)
    return token, value, score
