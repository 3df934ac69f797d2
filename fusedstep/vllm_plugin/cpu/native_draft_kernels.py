"""Kernels of speculative decoding of vLLM's Model Runner V2 on the CPU: numba, as in
``native_kernels``, for drafts and their verification (``v1/worker/gpu/spec_decode``).
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import math

import numpy as np
from numba import njit

# Intrinsics only: numba's cache would not see a change of a function in another file.
from fusedstep.ops.native_sample import larger, widen

_kernel = njit(cache=True, nogil=True, error_model="numpy")

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_MINUS_INF = np.float32(-np.inf)
_RAND_SCALE = np.float32(4.6566127342e-10)  # of Triton's tl.rand; vLLM's least number, too


@_kernel
def expand_idx_mapping(idx_mapping, expanded_idx_mapping, expanded_local_pos, cu_num_logits):
    """Each logit's request, and its place among the request's logits."""
    for batch_idx in range(len(idx_mapping)):
        start = cu_num_logits[batch_idx]
        for i in range(cu_num_logits[batch_idx + 1] - start):
            expanded_idx_mapping[start + i] = idx_mapping[batch_idx]
            expanded_local_pos[start + i] = i


@_kernel
def gather_draft_sampled(
    draft_sampled,
    positions_of_logits,
    input_ids,
    positions,
    logits_indices,
    expanded_idx_mapping,
    expanded_local_pos,
    prefill_lens,
):
    """Each logit's token and position; -1 where a draft would stand within the prompt."""
    for i in range(len(logits_indices)):
        position = positions[logits_indices[i]]
        num_drafts = expanded_local_pos[i]
        within = position - num_drafts < prefill_lens[expanded_idx_mapping[i]]
        draft_sampled[i] = -1 if num_drafts > 0 and within else input_ids[logits_indices[i]]
        positions_of_logits[i] = position


@_kernel
def flatten_sampled(flat_sampled, sampled, sampled_stride, num_sampled, cu_num_logits):
    """The sampled tokens of all requests, each at its first logit and behind."""
    for batch_idx in range(len(num_sampled)):
        for i in range(num_sampled[batch_idx]):
            flat_sampled[cu_num_logits[batch_idx] + i] = sampled[batch_idx, i]


@_kernel
def block_maxima(
    flat, stride, vocab_size, block_size, local_pos, num_steps, is_greedy, argmax, maxima
):
    """Of each block of a row that verifies a draft: the largest logit; of a greedy one, which."""
    for row in range(len(local_pos)):
        if local_pos[row] >= num_steps:
            continue
        for block in range(maxima.shape[1]):
            first = block * block_size
            logits = flat[row * stride + first : row * stride + min(first + block_size, vocab_size)]
            top = _MINUS_INF
            for i in range(len(logits)):
                top = larger(top, widen(logits[i]))
            maxima[row, block] = top
            if is_greedy[row]:
                at = 0
                while at < len(logits) - 1 and widen(logits[at]) != top:
                    at += 1
                argmax[row, block] = first + at


@_kernel
def _multiply_high(a, b):
    return np.uint32((np.uint64(a) * np.uint64(b)) >> np.uint64(32))


@_kernel
def uniform(seed, position):
    """``tl_rand32(seed, position, includes_zero=False)``: ten rounds of Philox4x32."""
    k0, k1 = np.uint32(seed & 0xFFFFFFFF), np.uint32((seed >> 32) & 0xFFFFFFFF)
    c0, c1 = np.uint32(position & 0xFFFFFFFF), np.uint32((position >> 32) & 0xFFFFFFFF)
    c2 = c3 = np.uint32(0)
    a, b = np.uint32(0xD2511F53), np.uint32(0xCD9E8D57)
    for _ in range(10):
        high_a, high_b = _multiply_high(a, c0), _multiply_high(b, c2)
        low_a, low_b = np.uint32(a * c0), np.uint32(b * c2)
        c0, c1 = np.uint32(high_b ^ c1 ^ k0), low_b
        c2, c3 = np.uint32(high_a ^ c3 ^ k1), low_a
        k0 = np.uint32(k0 + np.uint32(0x9E3779B9))
        k1 = np.uint32(k1 + np.uint32(0xBB67AE85))
    bits = np.int32(c0)
    return max(np.float32(~bits if bits < 0 else bits) * _RAND_SCALE, _RAND_SCALE)


@_kernel
def _logsumexp(maxima, sums):
    """Of a row, from its blocks: their maxima and the sums of their exp(logit - maximum)."""
    top, total = _MINUS_INF, _ZERO
    for maximum in maxima:
        top = max(top, maximum)
    for block in range(len(maxima)):
        total += sums[block] * np.float32(math.exp(np.float32(maxima[block] - top)))
    return np.float32(top + np.float32(math.log(total)))


@_kernel
def _winner(maxima, tokens):
    """The token of the first block whose maximum is the largest. NaN is none."""
    best = 0
    for block in range(1, len(maxima)):
        if maxima[block] > maxima[best] or (np.isnan(maxima[best]) and maxima[block] > -np.inf):
            best = block
    return tokens[best]


@_kernel
def _log_ratio(logit, target_blocks, draft_blocks):
    """log p, log q of the draft behind a logit, and the logsumexp of both rows.

    Blocks are the maxima and sums of a row's blocks, and each draft's logit. A draft without
    logits is certain.
    """
    target_maxima, target_sums, target_logits = target_blocks
    target_sum = _logsumexp(target_maxima[logit], target_sums[logit])
    log_p = np.float32(target_logits[logit] - target_sum)
    if draft_blocks is None:
        return log_p, _ZERO, target_sum, _ZERO
    draft_maxima, draft_sums, draft_logits = draft_blocks
    draft_sum = _logsumexp(draft_maxima[logit], draft_sums[logit])
    return log_p, np.float32(draft_logits[logit] - draft_sum), target_sum, draft_sum


@_kernel
def cumulative_log_p(
    log_ps, drafts, cu_num_logits, idx_mapping, temperatures, target_blocks, draft_blocks
):
    """The log of the joint ratio p / q of the drafts up to each one, at most 0."""
    for batch_idx in range(len(idx_mapping)):
        if temperatures[idx_mapping[batch_idx]] == _ZERO:
            continue
        log_p = _ZERO
        for logit in range(cu_num_logits[batch_idx], cu_num_logits[batch_idx + 1] - 1):
            if drafts[logit + 1] >= 0:
                p, q, _, _ = _log_ratio(logit, target_blocks, draft_blocks)
                log_p = min(np.float32(log_p + np.float32(p - q)), _ZERO)
            log_ps[logit] = log_p


@_kernel
def _threshold(logit, is_last, drafts, log_ps, residual_mass, target_blocks, draft_blocks):
    """Block verification accepts all drafts up to this one where u is at most this."""
    ratio = np.float32(math.exp(log_ps[logit]))
    if is_last or drafts[logit + 2] < 0:
        return ratio
    if draft_blocks is None:
        p, _, _, _ = _log_ratio(logit + 1, target_blocks, None)
        mass = np.float32(ratio * np.float32(_ONE - np.float32(math.exp(p))))
    else:
        mass = residual_mass[logit + 1].sum()
    whole = np.float32(np.float32(mass + _ONE) - ratio)
    return np.float32(mass / whole) if whole > _ZERO else _ONE


@_kernel
def reject(
    sampled,
    num_accepted,
    target_rejected_sums,
    draft_rejected_sums,
    target_argmax,
    drafts,
    cu_num_logits,
    idx_mapping,
    temperatures,
    seeds,
    positions,
    rates,  # [num_speculative_steps] float32 or None: drafts hold so often, whatever they are
    log_ps,  # [num_logits] float32 or None: block verification
    residual_mass,
    target_blocks,
    draft_blocks,
):
    """Takes each request's drafts up to the first that does not hold."""
    for batch_idx in range(len(idx_mapping)):
        req, start = idx_mapping[batch_idx], cu_num_logits[batch_idx]
        num_drafts = cu_num_logits[batch_idx + 1] - start - 1
        is_greedy = temperatures[req] == _ZERO
        target_sum = draft_sum = _ZERO
        accepted = 0
        for i in range(num_drafts):
            logit = start + i
            draft = drafts[logit + 1]
            if draft < 0 and not is_greedy:
                break
            u = uniform(seeds[req], positions[logit])
            if is_greedy:
                best = _winner(target_blocks[0][logit], target_argmax[logit])
                holds = draft >= 0 and (u < rates[i] if rates is not None else best == draft)
                sampled[batch_idx, i] = draft if holds else best
            elif log_ps is not None:
                sampled[batch_idx, i] = draft
                is_last = i == num_drafts - 1
                if u <= _threshold(
                    logit, is_last, drafts, log_ps, residual_mass, target_blocks, draft_blocks
                ):
                    accepted = i + 1
                continue
            else:
                log_p, log_q, target_sum, draft_sum = _log_ratio(logit, target_blocks, draft_blocks)
                log_u = np.float32(math.log(u))
                holds = u < rates[i] if rates is not None else log_p > np.float32(log_u + log_q)
                sampled[batch_idx, i] = draft
            if not holds:
                break
            accepted += 1
        if log_ps is not None and not is_greedy and accepted < num_drafts:
            target_sum = _logsumexp(
                target_blocks[0][start + accepted], target_blocks[1][start + accepted]
            )
            if draft_blocks is not None:
                draft_sum = _logsumexp(
                    draft_blocks[0][start + accepted], draft_blocks[1][start + accepted]
                )
        num_accepted[batch_idx] = accepted
        target_rejected_sums[batch_idx], draft_rejected_sums[batch_idx] = target_sum, draft_sum


@_kernel
def insert_resampled(
    sampled,
    sampled_stride,
    num_sampled,
    tokens,  # [num_reqs, num_blocks]
    tokens_stride,
    maxima,  # [num_reqs, num_blocks]
    maxima_stride,
    num_blocks,
    cu_num_logits,
    expanded_idx_mapping,
    temperatures,
):
    """The token behind those accepted. A greedy one that was rejected is in its place already."""
    for batch_idx in range(len(num_sampled)):
        accepted = num_sampled[batch_idx]
        logit = cu_num_logits[batch_idx] + accepted
        num_sampled[batch_idx] = accepted + 1
        is_bonus = logit == cu_num_logits[batch_idx + 1] - 1
        if is_bonus or temperatures[expanded_idx_mapping[logit]] != _ZERO:
            sampled[batch_idx, accepted] = _winner(maxima[batch_idx], tokens[batch_idx])


@_kernel
def prepare_standalone_prefill(
    input_ids,
    positions,
    last_sampled,
    idx_mapping,
    out_input_ids,
    out_positions,
    last_token_indices,
    out_query_start_loc,
    out_seq_lens,
    query_start_loc,
    seq_lens,
    num_rejected,
    max_num_reqs,
    max_model_len,
):
    """A draft model's first input: the tokens that hold, the one behind them, unused places."""
    num_reqs = len(idx_mapping)
    for batch_idx in range(num_reqs):
        start = query_start_loc[batch_idx]
        out_start = start + batch_idx
        query_len = query_start_loc[batch_idx + 1] - start
        num_valid = query_len - num_rejected[batch_idx]
        for i in range(query_len + 1):
            token = input_ids[start + i] if i < num_valid else 0
            if i == num_valid:
                token = last_sampled[idx_mapping[batch_idx]]
            out_input_ids[out_start + i] = token
            out_positions[out_start + i] = min(positions[start] + i, max_model_len - 1)
        last_token_indices[batch_idx] = out_start + num_valid
        out_query_start_loc[batch_idx] = out_start
        out_seq_lens[batch_idx] = min(seq_lens[batch_idx] + 1, max_model_len)
    total = query_start_loc[num_reqs] + num_reqs
    out_query_start_loc[num_reqs : max_num_reqs + 1] = total
    out_seq_lens[num_reqs:max_num_reqs] = 0
    last_token_indices[num_reqs:max_num_reqs] = 0


@_kernel
def prepare_head_prefill(
    last_token_indices,
    out_input_ids,
    out_positions,
    out_query_start_loc,
    out_seq_lens,
    input_ids,
    positions,
    idx_mapping,
    last_sampled,
    next_prefill_tokens,
    num_sampled,
    num_rejected,
    query_start_loc,
    seq_lens,
    max_num_reqs,
):
    """An EAGLE head's first input: the target's, one token further."""
    num_reqs = len(idx_mapping)
    for batch_idx in range(num_reqs):
        req, start = idx_mapping[batch_idx], query_start_loc[batch_idx]
        query_len = query_start_loc[batch_idx + 1] - start - num_rejected[batch_idx]
        for i in range(1, query_len):
            out_input_ids[start + i - 1] = input_ids[start + i]
        last = start + query_len - 1
        if num_sampled[batch_idx] > 0:
            out_input_ids[last] = last_sampled[req]
        else:
            out_input_ids[last] = next_prefill_tokens[req]
        last_token_indices[batch_idx] = last
        for i in range(query_len):
            out_positions[start + i] = positions[start + i]
        out_query_start_loc[batch_idx] = start
        out_seq_lens[batch_idx] = seq_lens[batch_idx]
    out_query_start_loc[num_reqs : max_num_reqs + 1] = query_start_loc[num_reqs]
    out_seq_lens[num_reqs:max_num_reqs] = 0
    last_token_indices[num_reqs:max_num_reqs] = 0


@_kernel
def prepare_head_decode(
    draft_tokens,
    draft_tokens_stride,
    target_seq_lens,
    num_rejected,
    input_ids,
    positions,
    sample_positions,
    query_start_loc,
    seq_lens,
    max_model_len,
    max_num_reqs,
    advance,
):
    """An EAGLE head's second input: one token of each request."""
    num_reqs = len(draft_tokens)
    for batch_idx in range(num_reqs):
        input_ids[batch_idx] = draft_tokens[batch_idx]
        sample_positions[batch_idx] += 1
        query_start_loc[batch_idx] = batch_idx
        seq_len = target_seq_lens[batch_idx] - num_rejected[batch_idx]
        if advance:
            positions[batch_idx] = min(positions[batch_idx] + 1, max_model_len - 1)
            seq_len = min(seq_len + 1, max_model_len)
        seq_lens[batch_idx] = seq_len
    query_start_loc[num_reqs : max_num_reqs + 1] = num_reqs
    seq_lens[num_reqs:max_num_reqs] = 0


@_kernel
def advance_head(
    input_ids, positions, sample_positions, seq_lens, draft_tokens, max_model_len, advance
):
    """An EAGLE head's next input: the token it has just drafted."""
    for batch_idx in range(len(draft_tokens)):
        sample_positions[batch_idx] += 1
        input_ids[batch_idx] = draft_tokens[batch_idx]
        if advance:
            positions[batch_idx] = min(positions[batch_idx] + 1, max_model_len - 1)
            seq_lens[batch_idx] = min(seq_lens[batch_idx] + 1, max_model_len)
