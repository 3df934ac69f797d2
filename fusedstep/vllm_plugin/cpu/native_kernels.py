"""Bookkeeping kernels of vLLM's Model Runner V2 on the CPU: numba, used by ``vllm_plugin``.

Each has the arguments of the Triton kernel of the same name (``v1/worker/gpu``) up to its
constants, as numpy arrays, and loops over what the launch grid would spread. ``*_stride`` arguments
are not needed; block tables come as arrays of addresses, one per KV cache group.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from fusedstep.ops.types import PAD_SLOT_ID

_kernel = njit(cache=True, nogil=True, error_model="numpy")


@intrinsic
def _pointer(typing_context, address):
    """The void pointer of an integer address."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


@_kernel
def prepare_prefill_inputs(
    input_ids,
    next_prefill_tokens,
    next_prefill_tokens_stride,
    num_lookahead,
    idx_mapping,
    query_start_loc,
    all_token_ids,
    all_token_ids_stride,
    prefill_lens,
    num_computed_tokens,
):
    """Input ids of the rows that prefill, and the tokens that follow them."""
    for batch_idx in range(len(idx_mapping)):
        req = idx_mapping[batch_idx]
        prefill_len, num_computed = prefill_lens[req], num_computed_tokens[req]
        if num_computed >= prefill_len:
            continue
        start = query_start_loc[batch_idx]
        query_len = query_start_loc[batch_idx + 1] - start
        for i in range(query_len):
            input_ids[start + i] = all_token_ids[req, num_computed + i]
        for i in range(num_lookahead):
            position = num_computed + query_len + i
            token = all_token_ids[req, position] if position < prefill_len else 0
            next_prefill_tokens[i, req] = token


@_kernel
def prepare_pos_seq_lens(
    positions, seq_lens, idx_mapping, query_start_loc, num_computed_tokens, max_num_reqs
):
    """Positions of all tokens and lengths of all rows; lengths beyond the batch are 0."""
    num_reqs = len(idx_mapping)
    for batch_idx in range(num_reqs):
        num_computed = num_computed_tokens[idx_mapping[batch_idx]]
        start = query_start_loc[batch_idx]
        query_len = query_start_loc[batch_idx + 1] - start
        seq_lens[batch_idx] = num_computed + query_len
        for i in range(query_len):
            positions[start + i] = num_computed + i
    seq_lens[num_reqs:max_num_reqs] = 0


@_kernel
def prepare_rope_positions(
    positions,  # [num_dims, max_num_tokens + 1]
    positions_stride,
    prefill_positions,  # [max_num_reqs * num_dims, max_model_len]
    prefill_positions_stride0,
    prefill_positions_stride1,
    prefill_delta,
    idx_mapping,
    query_start_loc,
    prefill_lens,
    num_computed_tokens,
):
    """M-RoPE positions: of a prompt's tokens as staged, of others with its prefill's delta."""
    num_dims = len(positions)
    for batch_idx in range(len(idx_mapping)):
        req = idx_mapping[batch_idx]
        num_computed = num_computed_tokens[req]
        is_prefill = num_computed < prefill_lens[req]
        start = query_start_loc[batch_idx]
        for i in range(query_start_loc[batch_idx + 1] - start):
            for dim in range(num_dims):
                if is_prefill:
                    position = prefill_positions[req * num_dims + dim, num_computed + i]
                else:
                    position = num_computed + i + prefill_delta[req]
                positions[dim, start + i] = position


@_kernel
def combine_sampled_and_draft_tokens(
    input_ids,
    idx_mapping,
    last_sampled_tokens,
    query_start_loc,
    seq_lens,
    prefill_lens,
    draft_tokens,
    draft_tokens_stride,
    cu_num_logits,
    logits_indices,
    num_new_sampled_tokens,
):
    """Indices of the logits; sampled and draft tokens become the decode rows' input."""
    for batch_idx in range(len(idx_mapping)):
        req = idx_mapping[batch_idx]
        first_logit = cu_num_logits[batch_idx]
        num_logits = cu_num_logits[batch_idx + 1] - first_logit
        num_draft_tokens = num_logits - num_new_sampled_tokens
        query_end = query_start_loc[batch_idx + 1]
        for i in range(num_logits):
            logits_indices[first_logit + i] = query_end - num_logits + i
        seq_len, prefill_len = seq_lens[batch_idx], prefill_lens[req]
        if seq_len <= prefill_len:
            continue
        if num_new_sampled_tokens > 0 and seq_len - num_logits >= prefill_len:
            input_ids[query_end - num_logits] = last_sampled_tokens[req, 0]
        for i in range(num_draft_tokens):
            input_ids[query_end - num_draft_tokens + i] = draft_tokens[req, i]


@_kernel
def get_num_sampled_and_rejected(
    num_sampled, num_rejected, seq_lens, cu_num_logits, idx_mapping, prefill_lens
):
    """A row in the middle of its prefill samples and rejects nothing."""
    for batch_idx in range(len(idx_mapping)):
        if seq_lens[batch_idx] < prefill_lens[idx_mapping[batch_idx]]:
            num_sampled[batch_idx] = 0
            num_rejected[batch_idx] = 0
        else:
            num_logits = cu_num_logits[batch_idx + 1] - cu_num_logits[batch_idx]
            num_rejected[batch_idx] = num_logits - num_sampled[batch_idx]


@_kernel
def post_update(
    idx_mapping,
    num_computed_tokens,
    last_sampled_tokens,
    output_bin_counts,
    output_bin_counts_stride,
    sampled_tokens,
    sampled_tokens_stride,
    num_sampled,
    num_rejected,
    query_start_loc,
    all_token_ids,
    all_token_ids_stride,
    total_lens,
):
    """Appends the sampled tokens to their requests. A negative index marks a row to skip."""
    for batch_idx in range(len(idx_mapping)):
        req = idx_mapping[batch_idx]
        if req < 0:
            continue
        for i in range(num_sampled[batch_idx]):
            token = sampled_tokens[batch_idx, i]
            all_token_ids[req, total_lens[req] + i] = token
            last_sampled_tokens[req, 0] = token
            if output_bin_counts is not None:
                output_bin_counts[req, token] += 1
        total_lens[req] += num_sampled[batch_idx]
        num_computed_tokens[req] -= num_rejected[batch_idx]
        if query_start_loc is not None:
            query_len = query_start_loc[batch_idx + 1] - query_start_loc[batch_idx]
            num_computed_tokens[req] += query_len


@_kernel
def post_update_num_computed_tokens(idx_mapping, num_computed_tokens, query_start_loc):
    """Every row has computed its query."""
    for batch_idx in range(len(idx_mapping)):
        query_len = query_start_loc[batch_idx + 1] - query_start_loc[batch_idx]
        num_computed_tokens[idx_mapping[batch_idx]] += query_len


@_kernel
def gather_block_tables(idx_mapping, sources, targets, strides, num_blocks, _stride, num_reqs):
    """Copies the batch's block tables; ``sources`` and ``targets`` hold addresses, one per group.

    The stock kernel zeroes the rows that pad the batch. Their number is not known here, so every
    later row is zeroed that does not already begin with block 0, the null block.
    """
    max_num_reqs = num_blocks.shape[1]
    for group in range(len(sources)):
        shape = (max_num_reqs, strides[group])
        source = carray(_pointer(sources[group]), shape, np.int32)
        target = carray(_pointer(targets[group]), shape, np.int32)
        for batch_idx in range(num_reqs):
            req = idx_mapping[batch_idx]
            for i in range(num_blocks[group, req]):
                target[batch_idx, i] = source[req, i]
        for batch_idx in range(num_reqs, max_num_reqs):
            if target[batch_idx, 0] != 0:
                target[batch_idx] = 0


@_kernel
def map_slots(
    idx_mapping, query_start_loc, positions, tables, strides, block_sizes, enabled, slot_mappings
):
    """The KV slot of every token; PAD_SLOT_ID behind the last token and where there is no block."""
    num_reqs = len(idx_mapping)
    for group in range(len(tables)):
        slots, block_size = slot_mappings[group], np.int64(block_sizes[group])
        table = carray(_pointer(tables[group]), (1 << 31, strides[group]), np.int32)
        for batch_idx in range(num_reqs):
            req = idx_mapping[batch_idx]
            for token in range(query_start_loc[batch_idx], query_start_loc[batch_idx + 1]):
                slots[token] = PAD_SLOT_ID
                if req >= 0 and enabled[group]:
                    block = np.int64(table[req, positions[token] // block_size])
                    slots[token] = block * block_size + positions[token] % block_size
        slots[query_start_loc[num_reqs] :] = PAD_SLOT_ID


@_kernel
def write_rows(target, stride, indices, starts, contents, cu_lens):
    """Writes piece i of ``contents`` into row indices[i] of flat ``target``, from starts[i]."""
    begin = 0
    for i in range(len(indices)):
        start = np.int64(indices[i]) * stride + starts[i]
        for j in range(cu_lens[i] - begin):
            target[start + j] = contents[begin + j]
        begin = cu_lens[i]


@_kernel
def write_groups(targets, strides, indices, starts, contents, cu_lens, group_ids):
    """``write_rows`` into one of several tables, given by their addresses."""
    begin = 0
    for i in range(len(indices)):
        group = group_ids[i]
        target = carray(_pointer(targets[group]), (1 << 31, strides[group]), np.int32)
        for j in range(cu_lens[i] - begin):
            target[indices[i], starts[i] + j] = contents[begin + j]
        begin = cu_lens[i]


@_kernel
def bincount(
    idx_mapping,
    all_token_ids,
    all_token_ids_stride,
    prompt_lens,
    prefill_lens,
    prompt_bin_mask,
    prompt_bin_mask_stride,
    output_bin_counts,
    output_bin_counts_stride,
):
    """Penalty statistics of requests that enter: a bit per prompt token, a count per output one."""
    for i in range(len(idx_mapping)):
        req = idx_mapping[i]
        for position in range(prompt_lens[req]):
            token = all_token_ids[req, position]
            prompt_bin_mask[req, token >> 5] |= np.int32(np.uint32(1) << np.uint32(token & 31))
        for position in range(prompt_lens[req], prefill_lens[req]):
            output_bin_counts[req, all_token_ids[req, position]] += 1


@_kernel
def update_committed_marker_cache(
    req_ids,
    thinking_token_budget,
    all_token_ids,
    all_token_ids_stride,
    total_len,
    cached_last_start,
    cached_last_end,
    cached_scan_pos,
    start_ids,
    end_ids,
):
    """Notes where a thought last began and ended in each request with a budget."""
    for i in range(len(req_ids)):
        req = req_ids[i]
        if thinking_token_budget[req] < 0:
            continue
        tokens = all_token_ids[req, : total_len[req]]
        begin = cached_scan_pos[req]
        if begin > len(tokens):
            begin = 0
            cached_last_start[req] = cached_last_end[req] = -1
        for at in range(begin, len(tokens)):
            if _stands_at(tokens, at, start_ids):
                cached_last_start[req] = at
            if _stands_at(tokens, at, end_ids):
                cached_last_end[req] = at
        # The next look begins where a marker may still be incomplete.
        cached_scan_pos[req] = max(len(tokens) - max(len(start_ids), len(end_ids)) + 1, 0)


@_kernel
def thinking_budget(
    logits,
    logits_stride,
    expanded_idx_mapping,
    thinking_token_budget,
    all_token_ids,
    all_token_ids_stride,
    total_len,
    input_ids,
    expanded_local_pos,
    cached_last_start,
    cached_last_end,
    start_ids,
    natural_end_ids,
    forced_end_ids,
):
    """A thought that has used up its budget gets the next token of the end that is forced."""
    for row in range(len(expanded_idx_mapping)):
        req = expanded_idx_mapping[row]
        budget = thinking_token_budget[req]
        if budget < 0:
            continue
        # Behind the committed tokens come the drafts before this row, in the input ids.
        committed, num_drafts = total_len[req], expanded_local_pos[row]
        tokens = np.empty(committed + num_drafts, np.int32)
        tokens[:committed] = all_token_ids[req, :committed]
        tokens[committed:] = input_ids[row - num_drafts + 1 : row + 1]
        last_start, last_end = cached_last_start[req], cached_last_end[req]
        for at in range(max(committed - len(start_ids) + 1, 0), len(tokens)):
            if _stands_at(tokens, at, start_ids):
                last_start = at
        for at in range(max(committed - len(natural_end_ids) + 1, 0), len(tokens)):
            if _stands_at(tokens, at, natural_end_ids):
                last_end = at
        if last_start < 0 or last_start <= last_end:
            continue
        if len(tokens) - (last_start + len(start_ids)) < budget:
            continue
        num_forced = 0  # tokens of the end that stand there already
        for length in range(1, min(len(forced_end_ids) - 1, len(tokens)) + 1):
            if _stands_at(tokens, len(tokens) - length, forced_end_ids[:length]):
                num_forced = length
        logits[row, forced_end_ids[num_forced]] = 1.0e9


@_kernel
def _stands_at(tokens, at, wanted):
    """Are the tokens from ``at`` on the wanted ones?"""
    if at + len(wanted) > len(tokens):
        return False
    for i in range(len(wanted)):  # noqa: SIM110 (numba knows no generators)
        if tokens[at + i] != wanted[i]:
            return False
    return True
