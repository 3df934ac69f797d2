"""Takes the tokens of a speculative round: those of a row's drafts that hold, and one more."""

from __future__ import annotations

import triton
import triton.language as tl

STOP_BLOCK = tl.constexpr(128)


@triton.jit
def accept_kernel(
    tokens_ptr,  # [num_reqs, width] int64
    num_tokens_ptr,  # [num_reqs] int32
    width,
    rows,
    requests,
    stop,
    strides,
):
    """Grid (num_reqs,). All of a row's tokens are taken; one of them may stop it."""
    batch_idx = tl.program_id(0)
    active = tl.load(rows.active + batch_idx)
    if active == 0:
        tl.store(num_tokens_ptr + batch_idx, 0)
        return
    req = tl.load(rows.idx_mapping + batch_idx)
    num_tokens = tl.load(num_tokens_ptr + batch_idx)
    total_len = tl.load(requests.total_len + req)
    num_computed = tl.load(requests.num_computed_tokens + req)
    num_sampled = tl.load(rows.num_sampled + batch_idx)
    num_stop = tl.load(stop.num_stop_token_ids + req)
    must_stop = total_len + num_tokens >= tl.load(stop.max_len + req)
    for i in range(num_tokens):
        token = tl.load(tokens_ptr + batch_idx * width + i)
        count_ptr = requests.output_bin_counts + req * strides.output_bin_counts + token
        count = tl.load(count_ptr)
        # All threads have loaded the count before one of them overwrites it, and with the barrier
        # below it is written before the next token, which may be the same, loads it. That one also
        # stands between the loads above the loop and the stores behind it: a row takes a token.
        tl.debug_barrier()
        tl.store(count_ptr, count + 1)
        tl.store(
            requests.all_token_ids + req * strides.all_token_ids + total_len + i,
            token.to(tl.int32),
        )
        tl.store(requests.last_sampled_tokens + req, token)
        for start in range(0, num_stop, STOP_BLOCK):
            column = start + tl.arange(0, STOP_BLOCK)
            ids = tl.load(
                stop.stop_token_ids + req * strides.stop_token_ids + column,
                mask=column < num_stop,
                other=-1,
            )
            must_stop = must_stop | (tl.max((ids == token).to(tl.int32)) > 0)
        tl.debug_barrier()
    tl.store(requests.total_len + req, total_len + num_tokens)
    tl.store(requests.num_computed_tokens + req, num_computed + num_tokens)
    tl.store(rows.num_sampled + batch_idx, num_sampled + num_tokens)
    if must_stop:
        tl.store(requests.stopped + req, True)
        tl.store(rows.active + batch_idx, False)
        # Atomic: other rows subtract, too. Relaxed: it is read by later launches only.
        tl.atomic_add(rows.num_active, -tl.load(rows.stop_weight), sem="relaxed")
