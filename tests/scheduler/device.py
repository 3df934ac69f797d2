"""A fake model runner and device: known tokens, a KV cache of hashes, batches in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from scheduler.trace import Spec, Trace, device_stop, next_hash, next_token
from vllm.model_executor.layers.mamba.checkpoint import compute_mamba_prefill_checkpoints
from vllm.v1.outputs import ModelRunnerOutput

from fusedstep.vllm_plugin.stamps import report_rounds
from fusedstep.window.arrivals import END_AFTER_ONE_STEP


@dataclass
class Row:
    """A request on the device."""

    spec: Spec
    number: int  # in its trace
    tokens: list[int]
    num_computed: int
    prefill_len: int
    blocks: list[list[int]]  # by KV-cache group
    stopped: bool = False
    state: tuple[int, int] = (0, 0)  # of this step: the tokens that it has seen, and their hash


@dataclass
class Batch:
    """What the scheduler handed over, and what has come of it."""

    output: Any  # SchedulerOutput
    sampled: dict[str, list[int]] = field(default_factory=dict)
    rounds: dict[str, list[int]] | None = None  # tokens of each, if it is a window of them
    num_steps: int = 0
    num_stopped: int = 0
    begun: bool = False
    done: bool = False

    def result(self) -> ModelRunnerOutput:
        req_ids = list(self.output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: n for n, req_id in enumerate(req_ids)},
            sampled_token_ids=[self.sampled.get(req_id, []) for req_id in req_ids],
        )
        if self.rounds is not None:
            report_rounds(result, [self.rounds.get(req_id, []) for req_id in req_ids])
        return result


class Device:
    """Runs batches step by step. ``fused``: decode batches are windows, stops are known here."""

    def __init__(self, trace: Trace, fused: bool, arrivals: Callable[[], int]) -> None:
        self.trace, self.fused, self.arrivals = trace, fused, arrivals
        self.rows: dict[str, Row] = {}
        # (block, offset) -> what the KV cache holds; None: a key that nobody may read
        self.values: dict[tuple[int, int], int | None] = {}
        self.states: dict[int, tuple[int, int]] = {}  # block -> tokens seen, and their hash
        self.random = Random(trace.seed)
        # Where states are cached windows do not: a newcomer may begin from a state of this one.
        self.gives_way = not (trace.states and trace.prefix_caching)

    def step(self, batch: Batch) -> bool:
        """One step; False if the batch had nothing left to do."""
        if not batch.begun:
            self._begin(batch)
        if batch.done:
            return False
        batch.num_steps += 1
        if self._is_window(batch):
            batch.done = self._window_step(batch)
        else:
            self._stock_step(batch)
            batch.done = True
        return True

    def _begin(self, batch: Batch) -> None:
        batch.begun, output = True, batch.output
        for req_id in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.rows.pop(req_id, None)
        for new in output.scheduled_new_reqs:
            assert new.prefill_token_ids is not None
            tokens = list(new.prefill_token_ids)
            blocks = [list(group) for group in new.block_ids]
            number = new.sampling_params.extra_args["number"]
            self.rows[new.req_id] = Row(
                *(self.trace.specs[number], number, tokens, new.num_computed_tokens),
                *(len(tokens), blocks),
            )
        cached = output.scheduled_cached_reqs
        for req_id, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            for held, more in zip(self.rows[req_id].blocks, new_blocks or (), strict=False):
                held.extend(more)
        scheduled = output.num_scheduled_tokens
        if self._is_window(batch):
            if self.trace.num_drafts:
                batch.rounds = {}
            live = {i: n for i, n in scheduled.items() if not self.rows[i].stopped}
            longest = max(live.values(), default=0) // self.width
            batch.done = not longest or (longest > 1 and self._gives_way(output.arrivals_seen))
        else:
            batch.done = not scheduled

    def _is_window(self, batch: Batch) -> bool:
        """As the runner decides it: nothing but decoding requests."""
        cached = batch.output.scheduled_cached_reqs
        return (
            self.fused
            and not batch.output.scheduled_new_reqs
            and bool(cached.req_ids)
            and self._are_whole(batch.output)
            and all(
                computed >= self.rows[req_id].prefill_len
                for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            )
        )

    @property
    def width(self) -> int:
        return 1 + self.trace.num_drafts

    def _are_whole(self, output: Any) -> bool:
        """As the runner decides it: as many rounds for each, with all drafts."""
        numbers = set(output.num_scheduled_tokens.values())
        return self.width == 1 or (len(numbers) == 1 and numbers.pop() % self.width == 0)

    def _window_step(self, batch: Batch) -> bool:
        """A token of each live row, or a round; is the window over after it?"""
        goes_on, stops = False, 0
        live = []
        for req_id, budget in batch.output.num_scheduled_tokens.items():
            row, sampled = self.rows[req_id], batch.sampled.setdefault(req_id, [])
            if not row.stopped and batch.num_steps * self.width <= budget:
                live.append((req_id, row, sampled, budget))
        self._load_states([row for _, row, _, _ in live])
        for req_id, row, sampled, budget in live:
            tokens = self._decode(row, self.trace.num_drafts)
            sampled += tokens
            if batch.rounds is not None:
                batch.rounds.setdefault(req_id, []).append((len(tokens), self.width - 1))
            stops += row.stopped
            goes_on |= not row.stopped and batch.num_steps * self.width < budget
        arrived = self.arrivals() > batch.output.arrivals_seen
        cut = self.random.random() < self.trace.cut
        batch.num_stopped += stops
        is_enough = 0 < batch.output.num_stops <= batch.num_stopped
        return not goes_on or arrived or cut or is_enough

    def _gives_way(self, seen: int) -> bool:
        """Has somebody come since the window was scheduled? Some devices miss it."""
        return (
            self.gives_way
            and END_AFTER_ONE_STEP < seen < self.arrivals()
            and self.random.random() < self.trace.gives_way
        )

    def _stock_step(self, batch: Batch) -> None:
        placeholders = batch.output.scheduled_spec_decode_tokens
        self._load_states([self.rows[req_id] for req_id in batch.output.num_scheduled_tokens])
        for req_id, scheduled in batch.output.num_scheduled_tokens.items():
            row = self.rows[req_id]
            num_tokens = scheduled - len(placeholders.get(req_id, ()))
            if row.num_computed >= row.prefill_len:
                assert num_tokens == 1
                drafts = min(scheduled - num_tokens, self.trace.num_drafts)
                batch.sampled[req_id] = [] if row.stopped else self._decode(row, drafts)
                continue
            self._checkpoint(row, row.num_computed + num_tokens)
            for _ in range(num_tokens - 1):
                self._compute(row)
            value = self._compute(row)
            self._store_state(row)
            if row.num_computed == row.prefill_len:
                batch.sampled[req_id] = [self._sample(row, value)]

    def _decode(self, row: Row, num_drafts: int = 0) -> list[int]:
        """The token behind the row's last, and the drafts that hold; a stop does not cut them."""
        start = row.num_computed
        assert start == len(row.tokens) - 1
        held = self.trace.num_held(row.number, start, num_drafts)
        tokens = []
        for _ in range(1 + held):
            value = self._compute(row)
            self._store_state(row)
            tokens.append(self._sample(row, value))
        for position in range(start + 1 + held, start + 1 + num_drafts):
            self._write(row, position, None)  # of a draft that did not hold
        if self.trace.draft_model and num_drafts:  # it drafts again, if it may
            end = min(row.num_computed + self.trace.num_drafts, self.trace.max_model_len)
            assert all(-(-end // self.trace.block_size) <= len(blocks) for blocks in row.blocks)
        return tokens

    def _load_states(self, rows: list[Row]) -> None:
        """What each row begins the step with. None sees what another writes in the same step."""
        if not self.trace.states:
            return
        for row in rows:
            row.state = (0, 0)
            if row.num_computed and not row.stopped:
                row.state = self.states[self._state_block(row, row.num_computed)]
                seen = row.tokens[: row.num_computed]
                assert row.state == (len(seen), _state_of(seen)), "the state of other tokens"

    def _store_state(self, row: Row) -> None:
        if self.trace.states:
            self.states[self._state_block(row, row.num_computed)] = row.state

    def _checkpoint(self, row: Row, end: int) -> None:
        """A prefill from here to ``end`` also keeps the state at the last block that it fills."""
        if not (self.trace.checkpoints and self.trace.prefix_caching):
            return
        size, start = self.trace.block_size, row.num_computed
        [offset], [column] = compute_mamba_prefill_checkpoints(
            [end], [end - start], size, size, 1, False, size
        )
        if offset:
            seen = row.tokens[: start + offset]
            self.states[self._writable(row.blocks[-1][column])] = len(seen), _state_of(seen)

    def _state_block(self, row: Row, num_tokens: int) -> int:
        """The block of the state after so many tokens; without a cache each request has one."""
        column = (num_tokens - 1) // self.trace.block_size if self.trace.prefix_caching else 0
        return self._writable(row.blocks[-1][column])

    def _writable(self, block: int) -> int:
        assert block != 0, "the null block"
        return block

    def _compute(self, row: Row) -> int:
        """The value of the next position, from those before it in the KV cache."""
        position = row.num_computed
        keys = row.blocks[:-1] if self.trace.states else row.blocks
        before = self._read(row, 0, position - 1) if position else 0
        assert position == 0 or before == self._read(row, len(keys) - 1, position - 1)
        if self.trace.states:
            assert row.state[0] == position
            row.state = position + 1, hash((row.state[1], row.tokens[position]))
        half = self._read(row, 0, position // 2) if position > 1 else 0
        value = next_hash(before, half, position, row.tokens[position])
        self._write(row, position, value)
        row.num_computed += 1
        return value

    def _write(self, row: Row, position: int, value: int | None) -> None:
        size = self.trace.block_size
        for blocks in row.blocks[:-1] if self.trace.states else row.blocks:
            self.values[blocks[position // size], position % size] = value

    def _read(self, row: Row, group: int, position: int) -> int:
        size = self.trace.block_size
        value = self.values[row.blocks[group][position // size], position % size]
        assert value is not None, "the key of a draft that did not hold"
        return value

    def _sample(self, row: Row, value: int) -> int:
        num_prompt_tokens = len(row.spec.prompt)
        token = next_token(value, row.spec, len(row.tokens) - num_prompt_tokens)
        row.tokens.append(token)
        output = row.tokens[num_prompt_tokens:]
        stop = self.fused and device_stop(row.spec, self.trace.max_model_len, output)
        row.stopped = row.stopped or bool(stop)
        return token


def _state_of(tokens: list[int]) -> int:
    value = 0
    for token in tokens:
        value = hash((value, token))
    return value
