"""Who wins a row: what every split of it found, and the winner among a part of it.

A row's vocabulary is split over programs. Each leaves its winner in ``scratch``; the last one to
arrive reduces. The order of a row's tokens is that of vLLM's sorted top-p: by logit, ties by token
id; a *cut* (value, token id) keeps the token itself and all after it.

``row`` is the tuple (logits_row, adjusted_row, is_adjusted, temperature, noise prefix).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.noise import gumbel_noise

NO_SCORE = tl.constexpr(float("-inf"))


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
    """True in the last of a row's programs; what the others have written is then visible."""
    tl.debug_barrier()
    arrived = tl.atomic_add(scratch.arrivals + batch_idx, 1, sem="acq_rel")
    is_last = arrived == num_programs - 1
    if is_last:
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
    place = ptr + batch_idx * NUM_SPLITS + split
    return tl.load(place, mask=split < NUM_SPLITS, other=other, cache_modifier=".cg")


@triton.jit
def log_total(tops, weights):
    """log(sum(weights * exp(tops))) as (max, log of the rest): a log-sum-exp from its parts."""
    top = tl.max(tops, axis=0)
    parts = tl.where(tops == float("-inf"), 0.0, weights * tl.exp(tops - top))
    return top, tl.log(tl.sum(parts, axis=0))


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

    A split whose own winner is kept needs no second look, and the score of any other split bounds
    what it can offer: few blocks are scored again, mostly one. The score is NO_SCORE when the cut
    keeps nothing.
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
