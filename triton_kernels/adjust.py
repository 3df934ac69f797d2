"""Adjusts logits before the temperature: bias, penalties, bad words, in vLLM's order.

A program adjusts its own block of a row. Lists of token ids are scattered into a float32 copy of
the block in memory, which a row without a list does not need. The thread that handles a list entry
is not the one that holds the token's logit: hence the barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl

LIST_BLOCK = tl.constexpr(128)


@triton.jit
def must_adjust(req, position, sampling):
    """True if this request has bias, penalties or bad words at ``position``."""
    return (
        _has_bias(req, position, sampling)
        | _has_penalties(req, sampling)
        | (tl.load(sampling.num_bad_words + req) > 0)
    )


@triton.jit
def _has_bias(req, position, sampling):
    return (
        (tl.load(sampling.num_allowed_token_ids + req) > 0)
        | (tl.load(sampling.num_logit_bias + req) > 0)
        | _masks_stop_tokens(req, position, sampling)
    )


@triton.jit
def _masks_stop_tokens(req, position, sampling):
    too_short = position + 1 < tl.load(sampling.min_lens + req)
    return too_short & (tl.load(sampling.num_min_stop_token_ids + req) > 0)


@triton.jit
def _has_penalties(req, sampling):
    return (
        (tl.load(sampling.repetition_penalty + req) != 1.0)
        | (tl.load(sampling.frequency_penalty + req) != 0.0)
        | (tl.load(sampling.presence_penalty + req) != 0.0)
    )


@triton.jit
def adjust(
    logits,  # [BLOCK_V] float32, the block of token ids that starts at first_token
    logits_row,  # the row's raw logits
    adjusted_row,  # [VOCAB_SIZE] float32, this block of it is ours
    first_token,
    req,
    position,
    requests,
    sampling,
    strides,
    VOCAB_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return the adjusted block, and store it in ``adjusted_row``."""
    token_ids = first_token + tl.arange(0, BLOCK_V)
    in_vocab = token_ids < VOCAB_SIZE
    if _has_bias(req, position, sampling):
        keep = tl.load(sampling.num_allowed_token_ids + req) == 0
        tl.store(adjusted_row + token_ids, tl.where(keep, logits, float("-inf")), mask=in_vocab)
        tl.debug_barrier()  # the copy is complete before list entries change it
        _apply_bias(
            logits_row, adjusted_row, first_token, req, position, sampling, strides, BLOCK_V
        )
        tl.debug_barrier()  # all list entries are applied before the block is read back
        logits = tl.load(adjusted_row + token_ids, mask=in_vocab, other=float("-inf"))
    if _has_penalties(req, sampling):
        logits = _apply_penalties(logits, token_ids, in_vocab, req, requests, sampling, strides)
    tl.debug_barrier()  # the block is read back before another thread may overwrite it
    tl.store(adjusted_row + token_ids, logits, mask=in_vocab)
    if tl.load(sampling.num_bad_words + req) > 0:
        tl.debug_barrier()  # the block is stored before list entries change it
        _forbid_bad_words(adjusted_row, first_token, req, requests, sampling, strides, BLOCK_V)
        tl.debug_barrier()  # all list entries are applied before the block is read back
        logits = tl.load(adjusted_row + token_ids, mask=in_vocab, other=float("-inf"))
    return logits


@triton.jit
def _apply_bias(
    logits_row,
    adjusted_row,
    first_token,
    req,
    position,
    sampling,
    strides,
    BLOCK_V: tl.constexpr,
):
    """Allowed token ids, logit bias, no stop token before min_lens, as in ``logit_bias.py``."""
    num_allowed = tl.load(sampling.num_allowed_token_ids + req)
    for start in range(0, num_allowed, LIST_BLOCK):
        column = start + tl.arange(0, LIST_BLOCK)
        ids = tl.load(
            sampling.allowed_token_ids + req * strides.allowed_token_ids + column,
            mask=column < num_allowed,
            other=-1,
        )
        ours = (ids >= first_token) & (ids < first_token + BLOCK_V)
        tl.store(adjusted_row + ids, tl.load(logits_row + ids, mask=ours).to(tl.float32), mask=ours)
    tl.debug_barrier()  # the bias is added to what the allowed ids have stored
    num_bias = tl.load(sampling.num_logit_bias + req)
    for start in range(0, num_bias, LIST_BLOCK):
        column = start + tl.arange(0, LIST_BLOCK)
        listed = column < num_bias
        row = req * strides.logit_bias
        ids = tl.load(sampling.logit_bias_token_ids + row + column, mask=listed, other=-1)
        bias = tl.load(sampling.logit_bias + row + column, mask=listed, other=0.0)
        ours = (ids >= first_token) & (ids < first_token + BLOCK_V)
        tl.store(adjusted_row + ids, tl.load(adjusted_row + ids, mask=ours) + bias, mask=ours)
    tl.debug_barrier()  # the mask has the last word on a token with a bias
    if _masks_stop_tokens(req, position, sampling):
        num_stop = tl.load(sampling.num_min_stop_token_ids + req)
        for start in range(0, num_stop, LIST_BLOCK):
            column = start + tl.arange(0, LIST_BLOCK)
            ids = tl.load(
                sampling.min_stop_token_ids + req * strides.min_stop_token_ids + column,
                mask=column < num_stop,
                other=-1,
            )
            ours = (ids >= first_token) & (ids < first_token + BLOCK_V)
            tl.store(adjusted_row + ids, float("-inf"), mask=ours)


@triton.jit
def _apply_penalties(logits, token_ids, in_vocab, req, requests, sampling, strides):
    """Repetition, frequency and presence penalty (``penalties.py``)."""
    repetition = tl.load(sampling.repetition_penalty + req)
    counts = tl.load(
        requests.output_bin_counts + req * strides.output_bin_counts + token_ids,
        mask=in_vocab,
        other=0,
    )
    in_output = counts > 0
    if repetition != 1.0:
        words = tl.load(
            requests.prompt_bin_mask + req * strides.prompt_bin_mask + token_ids // 32,
            mask=in_vocab,
            other=0,
        )
        in_prompt = ((words >> (token_ids % 32)) & 1) != 0
        scale = tl.where(in_prompt | in_output, repetition, 1.0)
        logits *= tl.where(logits > 0, 1.0 / scale, scale)
    logits -= tl.load(sampling.frequency_penalty + req) * counts
    logits -= tl.load(sampling.presence_penalty + req) * in_output
    return logits


@triton.jit
def _forbid_bad_words(
    adjusted_row, first_token, req, requests, sampling, strides, BLOCK_V: tl.constexpr
):
    """-inf for the last token of each bad word whose other tokens end the output."""
    num_words = tl.load(sampling.num_bad_words + req)
    total_len = tl.load(requests.total_len + req)
    output_len = total_len - tl.load(requests.prompt_len + req)
    output_end = requests.all_token_ids + req * strides.all_token_ids + total_len
    offsets = sampling.bad_word_offsets + req * strides.bad_word_offsets
    word_ids = sampling.bad_word_token_ids + req * strides.bad_word_token_ids
    for start in range(0, num_words, LIST_BLOCK):
        word = start + tl.arange(0, LIST_BLOCK)
        listed = word < num_words
        begin = tl.load(offsets + word, mask=listed, other=0)
        last = tl.load(offsets + word + 1, mask=listed, other=1) - 1
        prefix_len = last - begin
        matches = listed & (prefix_len <= output_len)
        for i in range(0, tl.max(tl.where(matches, prefix_len, 0))):
            compared = matches & (i < prefix_len)
            expected = tl.load(word_ids + begin + i, mask=compared, other=0)
            actual = tl.load(output_end - prefix_len + i, mask=compared, other=0)
            matches = matches & (expected == actual)
        ids = tl.load(word_ids + last, mask=matches, other=-1)
        ours = (ids >= first_token) & (ids < first_token + BLOCK_V)
        tl.store(adjusted_row + ids, float("-inf"), mask=ours)
