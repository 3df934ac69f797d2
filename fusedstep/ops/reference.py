"""The step operations in plain torch: the truth that the other implementations are tested against.

Slow and obvious: one row at a time, one sort per top-p row. ``ReferenceStep`` has the methods of
``native.NativeStep``; the functions below it are its parts.
"""

from __future__ import annotations

import torch

from fusedstep.ops.types import (
    FREE,
    NULL_BLOCK_ID,
    OUTSIDE,
    PAD_SLOT_ID,
    REASONS,
    BatchNeeds,
    GrammarState,
    RequestState,
    RowTokens,
    SamplingState,
    StepState,
    StopState,
    TokenInputs,
    WindowRows,
)

_UINT32 = 0xFFFFFFFF


class ReferenceStep:
    """``prepare``, then ``step`` once per decode step, on bound state."""

    def __init__(self, state: StepState) -> None:
        self.requests = state.requests
        self.sampling = state.sampling
        self.stop = state.stop
        self.inputs = state.inputs
        self.block_tables = state.block_tables
        self.num_blocks = state.num_blocks
        self.grammar = state.grammar

    def prepare(self, rows: WindowRows, num_reqs: int) -> None:
        """Start a window of ``num_reqs`` rows."""
        inputs = self.inputs
        for batch_idx in range(num_reqs):
            req = int(rows.idx_mapping[batch_idx])
            rows.num_sampled[batch_idx] = 0
            if req < 0:
                rows.active[batch_idx] = False
                for tensor in (inputs.input_ids, inputs.positions, inputs.seq_lens):
                    tensor[batch_idx] = 0
                continue
            rows.active[batch_idx] = (
                not self.requests.stopped[req] and rows.steps_allowed[batch_idx] > 0
            )
            for group, block_table in enumerate(self.block_tables):
                num_blocks = int(self.num_blocks[group, req])
                table = inputs.input_block_tables[group][batch_idx]
                table[:num_blocks] = block_table[req, :num_blocks]
                position = int(self.requests.num_computed_tokens[req])
                table[: min(inputs.num_below(group, position), num_blocks)] = NULL_BLOCK_ID
            self._place_input(batch_idx, req)
        inputs.seq_lens[num_reqs:] = 0
        inputs.slot_mappings[:, num_reqs:] = PAD_SLOT_ID
        self._map_slots(rows, num_reqs)
        rows.num_active[0] = rows.active[:num_reqs].sum()

    def step(
        self, logits: torch.Tensor, rows: WindowRows, num_reqs: int, needs: BatchNeeds
    ) -> None:
        """``sample``, then emit the tokens, apply the stop rule and place the next inputs."""
        self.sample(logits, rows, num_reqs, needs)
        self._advance(rows, num_reqs)
        if needs.grammar:
            self.follow(rows, num_reqs)
            self._end_outside(rows, num_reqs)

    def sample(
        self, logits: torch.Tensor, rows: WindowRows, num_reqs: int, needs: BatchNeeds
    ) -> None:
        """Write the token of each active row to ``rows.sampled``; ``logits`` is [num_reqs, V]."""
        if needs.grammar:
            self.constrain(logits, rows, num_reqs)
        for batch_idx in range(num_reqs):
            if not rows.active[batch_idx]:
                continue
            req, row = int(rows.idx_mapping[batch_idx]), logits[batch_idx].float()
            position = int(self.inputs.positions[batch_idx])
            token = sample_row(row, req, position, self.requests, self.sampling)
            rows.sampled[batch_idx] = token
            if needs.logprobs:
                rows.logprobs[batch_idx] = row.log_softmax(-1)[token]
                rows.ranks[batch_idx] = (row >= row[token]).sum()

    def accept(
        self, tokens: torch.Tensor, num_tokens: torch.Tensor, rows: WindowRows, num_reqs: int
    ) -> None:
        """Take the first ``num_tokens[b]`` of ``tokens[b]`` for each active row b; 0 for others."""
        for batch_idx in range(num_reqs):
            if not rows.active[batch_idx]:
                num_tokens[batch_idx] = 0
                continue
            req, stops = int(rows.idx_mapping[batch_idx]), False
            for token in tokens[batch_idx, : int(num_tokens[batch_idx])].tolist():
                self._take(req, token)
                stops |= must_stop(token, int(self.requests.total_len[req]), req, self.stop)
            rows.num_sampled[batch_idx] += num_tokens[batch_idx]
            if stops:
                self.requests.stopped[req] = True
                rows.active[batch_idx] = False
                rows.num_active.sub_(rows.stop_weight)

    def place(self, rows: WindowRows, num_reqs: int, out: TokenInputs, tokens: RowTokens) -> None:
        """Write these tokens of each row."""
        width, drafts, num_drafts, back, ahead = tokens
        inputs, max_len = self.inputs, self.requests.all_token_ids.shape[1]
        out.seq_lens[num_reqs:] = 0
        out.slot_mappings[:, num_reqs * width :] = PAD_SLOT_ID
        for batch_idx in range(num_reqs):
            req, at = int(rows.idx_mapping[batch_idx]), batch_idx * width
            back_by = 0 if back is None or req < 0 else int(back[batch_idx])
            out.last_sampled[batch_idx] = at + back_by
            out.slot_mappings[:, at : at + width] = PAD_SLOT_ID
            if req < 0:
                out.input_ids[at : at + width] = 0
                out.positions[at : at + width] = 0
                out.seq_lens[batch_idx] = 0
                continue
            computed = int(self.requests.num_computed_tokens[req])
            first = computed - back_by + ahead
            known = self.requests.all_token_ids[req, : computed + 1].tolist()
            known += drafts[batch_idx, :num_drafts].tolist() + [0] * width
            out.input_ids[at : at + width] = torch.tensor(known[first : first + width])
            positions = torch.arange(first, first + width).clamp(max=max_len - 1)
            out.positions[at : at + width] = positions
            out.seq_lens[batch_idx] = min(first + width, max_len)
            if rows.active[batch_idx]:
                for group, size in enumerate(inputs.block_sizes):
                    blocks = inputs.input_block_tables[group][batch_idx, positions // size]
                    out.slot_mappings[group, at : at + width] = blocks * size + positions % size

    def constrain(self, logits: torch.Tensor, rows: WindowRows, num_reqs: int) -> None:
        """Mask, in place, what the requests' grammars forbid. No row has sampled a token yet."""
        grammar = self.grammar
        assert grammar is not None
        rows.sampled[:num_reqs] = -1
        tokens = torch.arange(logits.shape[1])
        for batch_idx in range(num_reqs):
            req = int(rows.idx_mapping[batch_idx])
            state = int(grammar.states[req]) if req >= 0 else FREE
            if state >= 0:
                mask = grammar.masks[grammar.mask_ids[state]]
                allowed = (mask[tokens // 32] >> (tokens % 32)) & 1 == 1
                logits[batch_idx].masked_fill_(~allowed, -torch.inf)

    def follow(self, rows: WindowRows, num_reqs: int) -> None:
        """Move the request of each row that has sampled a token on in its grammar.

        One that gets outside of the tables takes no step of a window any more.
        """
        grammar = self.grammar
        assert grammar is not None
        for batch_idx in range(num_reqs):
            req, token = int(rows.idx_mapping[batch_idx]), int(rows.sampled[batch_idx])
            if token >= 0 and req >= 0:
                grammar.states[req] = state_after(token, req, grammar)
                self.requests.stopped[req] |= grammar.states[req] == OUTSIDE

    def _end_outside(self, rows: WindowRows, num_reqs: int) -> None:
        """End the rows whose requests are outside of their grammars' tables."""
        assert self.grammar is not None
        for batch_idx in range(num_reqs):
            req = int(rows.idx_mapping[batch_idx])
            if rows.active[batch_idx] and self.grammar.states[req] == OUTSIDE:
                rows.active[batch_idx] = False
                rows.num_active.sub_(1)
                self.inputs.slot_mappings[:, batch_idx] = PAD_SLOT_ID

    def _advance(self, rows: WindowRows, num_reqs: int) -> None:
        requests = self.requests
        for batch_idx in range(num_reqs):
            if not rows.active[batch_idx]:
                continue
            req, token = int(rows.idx_mapping[batch_idx]), int(rows.sampled[batch_idx])
            rows.out_tokens[rows.num_sampled[batch_idx], batch_idx] = token
            rows.num_sampled[batch_idx] += 1
            self._take(req, token)
            if must_stop(token, int(requests.total_len[req]), req, self.stop):
                requests.stopped[req] = True
                rows.active[batch_idx] = False
                rows.num_active.sub_(rows.stop_weight)
            elif rows.num_sampled[batch_idx] >= rows.steps_allowed[batch_idx]:
                rows.active[batch_idx] = False
                rows.num_active.sub_(1)
            else:
                self._place_input(batch_idx, req)
        self._map_slots(rows, num_reqs)

    def _take(self, req: int, token: int) -> None:
        """Append a token to its request."""
        requests = self.requests
        requests.last_sampled_tokens[req, 0] = token
        requests.all_token_ids[req, requests.total_len[req]] = token
        requests.total_len[req] += 1
        requests.num_computed_tokens[req] += 1
        requests.output_bin_counts[req, token] += 1

    def _place_input(self, batch_idx: int, req: int) -> None:
        position = int(self.requests.num_computed_tokens[req])
        self.inputs.input_ids[batch_idx] = self.requests.last_sampled_tokens[req, 0]
        self.inputs.positions[batch_idx] = position
        self.inputs.seq_lens[batch_idx] = position + 1

    def _map_slots(self, rows: WindowRows, num_reqs: int) -> None:
        inputs = self.inputs
        for group, block_size in enumerate(inputs.block_sizes):
            for batch_idx in range(num_reqs):
                slot = PAD_SLOT_ID
                if rows.active[batch_idx]:
                    index, offset = divmod(int(inputs.positions[batch_idx]), block_size)
                    block = int(inputs.input_block_tables[group][batch_idx, index])
                    slot = block * block_size + offset
                inputs.slot_mappings[group, batch_idx] = slot


def must_stop(token: int, total_len: int, req: int, stop: StopState) -> bool:
    """The device's part of vLLM's ``check_stop`` after ``token`` made the length ``total_len``."""
    stop_ids = stop.stop_token_ids[req, : int(stop.num_stop_token_ids[req])].tolist()
    return token in stop_ids or total_len >= int(stop.max_len[req])


def state_after(token: int, req: int, grammar: GrammarState) -> int:
    """The request's state in its grammar after ``token``, which its mask has let through.

    A token whose bytes lead nowhere, or that has none, ends the grammar: it is a stop token.
    """
    state = int(grammar.states[req])
    if state <= REASONS:
        end, first = grammar.reasoning_ends[req].tolist()
        return OUTSIDE if token == first else REASONS - state if token == end else state
    start, end = grammar.token_starts[token : token + 2].tolist()
    if start == end and state >= 0:
        return FREE
    for byte in grammar.token_bytes[start:end].tolist():
        if state >= 0:
            state = int(grammar.next_states[state, byte])
    return state


def sample_row(
    logits: torch.Tensor,  # [V] float32
    req: int,
    position: int,
    requests: RequestState,
    sampling: SamplingState,
) -> int:
    """One token for request ``req``, whose input token is at ``position``.

    The order of vLLM's ``v1/worker/gpu/sample/sampler.py``. Min-p, top-k and top-p are skipped for
    a greedy row, whose token they cannot change.
    """
    logits = apply_bias(logits.clone(), req, position, sampling)
    logits = apply_penalties(logits, req, requests, sampling)
    logits = apply_bad_words(logits, req, requests, sampling)
    temperature = float(sampling.temperature[req])
    if temperature == 0:
        return first_argmax(logits)
    logits = logits / sampling.temperature[req]
    logits = apply_min_p(logits, sampling.min_p[req])
    logits = apply_top_k(logits, int(sampling.top_k[req]))
    logits = apply_top_p(logits, sampling.top_p[req])
    tokens = torch.arange(logits.numel())
    return first_argmax(logits + gumbel_noise(int(sampling.seeds[req]), position, tokens))


def first_argmax(scores: torch.Tensor) -> int:
    """The first index of the largest score."""
    return int((scores == scores.max()).nonzero()[0])


def apply_bias(
    logits: torch.Tensor, req: int, position: int, sampling: SamplingState
) -> torch.Tensor:
    """Allowed token ids, logit bias, and no stop token before ``min_lens`` (``logit_bias.py``)."""
    if num_allowed := int(sampling.num_allowed_token_ids[req]):
        allowed = sampling.allowed_token_ids[req, :num_allowed].long()
        kept = torch.full_like(logits, -torch.inf)
        kept[allowed] = logits[allowed]
        logits = kept
    num_bias = int(sampling.num_logit_bias[req])
    biased = sampling.logit_bias_token_ids[req, :num_bias].long()
    logits[biased] += sampling.logit_bias[req, :num_bias]
    if position + 1 < int(sampling.min_lens[req]):
        num_stop = int(sampling.num_min_stop_token_ids[req])
        logits[sampling.min_stop_token_ids[req, :num_stop].long()] = -torch.inf
    return logits


def apply_penalties(
    logits: torch.Tensor, req: int, requests: RequestState, sampling: SamplingState
) -> torch.Tensor:
    """Repetition, frequency and presence penalty (``penalties.py``)."""
    repetition = sampling.repetition_penalty[req]
    tokens = torch.arange(logits.numel())
    in_prompt = (requests.prompt_bin_mask[req, tokens // 32] >> (tokens % 32)) & 1 == 1
    counts = requests.output_bin_counts[req]
    in_output = counts > 0
    if repetition != 1:
        scale = torch.where(in_prompt | in_output, repetition, torch.tensor(1.0))
        logits = logits * torch.where(logits > 0, 1 / scale, scale)
    logits = logits - sampling.frequency_penalty[req] * counts
    return logits - sampling.presence_penalty[req] * in_output


def apply_bad_words(
    logits: torch.Tensor, req: int, requests: RequestState, sampling: SamplingState
) -> torch.Tensor:
    """Mask the last token of each bad word whose other tokens end the output (``bad_words.py``)."""
    prompt_len, total_len = requests.prompt_len[req], requests.total_len[req]
    output = requests.all_token_ids[req, prompt_len:total_len].tolist()
    for word in range(int(sampling.num_bad_words[req])):
        start, end = sampling.bad_word_offsets[req, word : word + 2].tolist()
        *prefix, last = sampling.bad_word_token_ids[req, start:end].tolist()
        if output[max(len(output) - len(prefix), 0) :] == prefix:
            logits[last] = -torch.inf
    return logits


def apply_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Mask logits below max + log(min_p) (``min_p.py``)."""
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.max() + log(min_p), -torch.inf)


def apply_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Mask logits below the k-th largest; its ties stay (``topk_topp_sampler.py``)."""
    if k >= logits.numel():
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def apply_top_p(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Mask, in ascending order, while the cumulative probability is <= 1 - p; the last stays.

    Ties are in the order of their index (``v1/sample/ops/topk_topp_sampler.py``).
    """
    if top_p >= 1:
        return logits
    ascending, order = logits.sort(stable=True)
    masked = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    masked[-1] = False
    return logits.masked_fill(torch.zeros_like(masked).scatter(0, order, masked), -torch.inf)


def log(values: torch.Tensor) -> torch.Tensor:
    """The correctly rounded float32 logarithm."""
    return values.double().log().float()


def gumbel_noise(seed: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Noise of ``token_ids`` [n] int64 at (seed, position), float32 (``gumbel.py``).

    -log(-log(1 - u)), where u is (hash + 1/2) / 2**32 rounded to float32, the inner logarithm a
    series below 1/4. Any two correct implementations agree bit for bit, as both logarithms are
    correctly rounded here; vLLM's are those of its device and may differ in the last place.
    """
    random = murmur3(seed, position, token_ids)
    u = (random >> 16).float() * 2.0**-16 + ((random & 0xFFFF).float() + 0.5) * 2.0**-32
    series = torch.full_like(u, 1 / 8)
    for n in range(7, 0, -1):
        series = 1 / n + u * series
    minus_log = torch.where(u < 0.25, u * series, -log((1 - u).clamp(min=2.0**-24)))
    return -log(minus_log)


def murmur3(seed: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bits) of seed (64 bits), position and token id (32 bits each).

    ``token_ids`` and the result are int64, [n]; the values are those of a uint32.
    """
    state = torch.zeros_like(token_ids)
    for key in (seed & _UINT32, (seed >> 32) & _UINT32, position & _UINT32, token_ids):
        mixed = _rotate(torch.as_tensor(key) * 0xCC9E2D51 & _UINT32, 15) * 0x1B873593 & _UINT32
        state = (_rotate(state ^ mixed, 13) * 5 + 0xE6546B64) & _UINT32
    state = state ^ 16
    state = (state ^ (state >> 16)) * 0x85EBCA6B & _UINT32
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & _UINT32
    return state ^ (state >> 16)


def _rotate(value: torch.Tensor, shift: int) -> torch.Tensor:
    return ((value << shift) | (value >> (32 - shift))) & _UINT32
