"""Bookkeeping of a window's rows on the CPU: numba kernels, used by ``native.py``.

Rows and requests are named tuples of numpy arrays with the fields of ``types.WindowRows`` and
``types.RequestState``. One file, because numba's on-disk cache sees changes of a kernel's own file
only.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from numba import njit

from fusedstep.ops.types import NULL_BLOCK_ID, PAD_SLOT_ID

_kernel = njit(cache=True, nogil=True, error_model="numpy")


@_kernel
def _place_input(batch_idx, req, requests, inputs):
    """The request's last token is the next step's input."""
    position = requests.num_computed_tokens[req]
    inputs.input_ids[batch_idx] = requests.last_sampled_tokens[req, 0]
    inputs.positions[batch_idx] = position
    inputs.seq_lens[batch_idx] = position + 1


@_kernel
def prepare_rows(num_reqs, rows, requests, inputs):
    """Starts a window: active flags, and the first step's inputs."""
    rows.num_active[0] = 0
    for batch_idx in range(num_reqs):
        req = rows.idx_mapping[batch_idx]
        rows.num_sampled[batch_idx] = 0
        if req < 0:
            rows.active[batch_idx] = False
            inputs.input_ids[batch_idx] = 0
            inputs.positions[batch_idx] = 0
            inputs.seq_lens[batch_idx] = 0
            continue
        active = not requests.stopped[req] and rows.steps_allowed[batch_idx] > 0
        rows.active[batch_idx] = active
        rows.num_active[0] += active
        _place_input(batch_idx, req, requests, inputs)
    inputs.seq_lens[num_reqs:] = 0


@_kernel
def gather_blocks(
    num_reqs, idx_mapping, block_table, num_blocks, positions, block_size, sliding_reach, out
):
    """Copies each request's block ids into its row of ``out``, but for those below its sliding
    window; the rest of the row is stale."""
    for batch_idx in range(num_reqs):
        req = idx_mapping[batch_idx]
        num_below = max(positions[batch_idx] - sliding_reach, 0) // block_size
        if sliding_reach == 0:
            num_below = 0
        for i in range(num_blocks[req] if req >= 0 else 0):
            out[batch_idx, i] = NULL_BLOCK_ID if i < num_below else block_table[req, i]


@_kernel
def map_slots(num_reqs, active, positions, block_table, block_size, slots):
    """The KV slot of each active row's position, PAD_SLOT_ID for the others."""
    for batch_idx in range(num_reqs):
        slot = PAD_SLOT_ID
        if active[batch_idx]:
            position = positions[batch_idx]
            block = block_table[batch_idx, position // block_size]
            slot = block * block_size + position % block_size
        slots[batch_idx] = slot


@_kernel
def _accept(req, token, requests):
    """Appends a token to its request."""
    total_len = requests.total_len[req]
    requests.all_token_ids[req, total_len] = token
    requests.total_len[req] = total_len + 1
    requests.last_sampled_tokens[req, 0] = token
    requests.num_computed_tokens[req] += 1
    requests.output_bin_counts[req, token] += 1


@_kernel
def _must_stop(req, token, total_len, stop):
    if total_len >= stop.max_len[req]:
        return True
    for i in range(stop.num_stop_token_ids[req]):
        if stop.stop_token_ids[req, i] == token:
            return True
    return False


@_kernel
def accept_rows(num_reqs, tokens, num_tokens, rows, requests, stop):
    """Takes each active row's tokens of a speculative round, and stops the row at any of them."""
    for batch_idx in range(num_reqs):
        if not rows.active[batch_idx]:
            num_tokens[batch_idx] = 0
            continue
        req = rows.idx_mapping[batch_idx]
        must_stop = False
        for i in range(num_tokens[batch_idx]):
            _accept(req, tokens[batch_idx, i], requests)
            if _must_stop(req, tokens[batch_idx, i], requests.total_len[req], stop):
                must_stop = True
        rows.num_sampled[batch_idx] += num_tokens[batch_idx]
        if must_stop:
            requests.stopped[req] = True
            rows.active[batch_idx] = False
            rows.num_active[0] -= rows.stop_weight[0]


@_kernel
def place_tokens(num_reqs, width, drafts, num_drafts, back, ahead, rows, requests, out):
    """Writes ``width`` tokens of each row; ``back`` may be empty, for 0."""
    max_len = requests.all_token_ids.shape[1]
    out.seq_lens[num_reqs:] = 0
    for batch_idx in range(num_reqs):
        req, at = rows.idx_mapping[batch_idx], batch_idx * width
        back_by = back[batch_idx] if len(back) > 0 and req >= 0 else 0
        out.last_sampled[batch_idx] = at + back_by
        if req < 0:
            out.input_ids[at : at + width] = 0
            out.positions[at : at + width] = 0
            out.seq_lens[batch_idx] = 0
            continue
        computed = requests.num_computed_tokens[req]
        first = computed - back_by + ahead
        out.seq_lens[batch_idx] = min(first + width, max_len)
        for i in range(width):
            position = first + i
            token = 0
            if position <= computed:
                token = requests.all_token_ids[req, position]
            elif position - computed <= num_drafts:
                token = drafts[batch_idx, position - computed - 1]
            out.input_ids[at + i] = token
            out.positions[at + i] = min(position, max_len - 1)


@_kernel
def map_token_slots(num_reqs, width, active, positions, block_table, block_size, slots):
    """The KV slots of all tokens of each active row, PAD_SLOT_ID for all others."""
    for batch_idx in range(num_reqs):
        for i in range(batch_idx * width, (batch_idx + 1) * width):
            slot = PAD_SLOT_ID
            if active[batch_idx]:
                block = block_table[batch_idx, positions[i] // block_size]
                slot = block * block_size + positions[i] % block_size
            slots[i] = slot
    slots[num_reqs * width :] = PAD_SLOT_ID


@_kernel
def advance_rows(num_reqs, rows, requests, stop, inputs):
    """Takes each active row's token, stops the row or places its next input."""
    for batch_idx in range(num_reqs):
        if not rows.active[batch_idx]:
            continue
        req = rows.idx_mapping[batch_idx]
        token = rows.sampled[batch_idx]
        rows.out_tokens[rows.num_sampled[batch_idx], batch_idx] = token
        rows.num_sampled[batch_idx] += 1
        _accept(req, token, requests)
        if _must_stop(req, token, requests.total_len[req], stop):
            requests.stopped[req] = True
            rows.active[batch_idx] = False
            rows.num_active[0] -= rows.stop_weight[0]
        elif rows.num_sampled[batch_idx] >= rows.steps_allowed[batch_idx]:
            rows.active[batch_idx] = False
            rows.num_active[0] -= 1
        else:
            _place_input(batch_idx, req, requests, inputs)
