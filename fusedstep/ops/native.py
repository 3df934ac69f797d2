"""The step operations on the CPU: torch in, torch out, numba in between.

``NativeStep`` binds the state once, so that a call costs a few microseconds: the tensors have
static addresses, and their numpy views are made when they are first seen.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fusedstep.ops import native_grammar, native_rows, native_sample
from fusedstep.ops.check import (
    check_logits,
    check_num_reqs,
    check_place,
    check_round,
    check_rows,
    check_state,
    check_token_inputs,
)
from fusedstep.ops.types import (
    PAD_SLOT_ID,
    BatchNeeds,
    GrammarState,
    RequestState,
    RowTokens,
    SamplingState,
    StepInputs,
    StepState,
    StopState,
    TokenInputs,
    WindowRows,
)

CPU = torch.device("cpu")

# The integer type that carries a 16-bit float's bits to native_sample.widen.
_BIT_CARRIERS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_MINUS_INF = {
    dtype: torch.tensor([-torch.inf], dtype=dtype).view(carrier).numpy()
    for dtype, carrier in ({torch.float32: torch.float32} | _BIT_CARRIERS).items()
}


def _view_class(state_class: type) -> Any:
    return namedtuple(f"{state_class.__name__}Views", [f.name for f in fields(state_class)])


# Named tuples of numpy arrays with the fields of the class: what a kernel takes. They are
# attributes of the module because numba's on-disk cache finds them by name.
RequestStateViews = _view_class(RequestState)
SamplingStateViews = _view_class(SamplingState)
StopStateViews = _view_class(StopState)
WindowRowsViews = _view_class(WindowRows)
GrammarStateViews = _view_class(GrammarState)
TokenInputsViews = _view_class(TokenInputs)
_NONE = np.zeros(0, np.int32)


class StepInputsViews(NamedTuple):
    """The part of StepInputs that has no KV cache group."""

    input_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    seq_lens: npt.NDArray[np.int32]


class _Group(NamedTuple):
    """One KV cache group's arrays."""

    block_table: npt.NDArray[np.int32]  # [R, max_num_blocks], row = req_state_idx
    num_blocks: npt.NDArray[np.int32]  # [R]
    input_block_table: npt.NDArray[np.int32]  # [R, max_num_blocks], row = batch_idx
    slots: npt.NDArray[np.int64]  # [max_num_tokens]
    block_size: int
    sliding_reach: int


def _views(view_class: Any, state: object) -> Any:
    return view_class(*(getattr(state, name).numpy() for name in view_class._fields))


def flat_logits(logits: torch.Tensor) -> npt.NDArray[Any]:
    """A 1-D view of [n, V] logits with any row stride; 16-bit floats come as integers."""
    num_rows, vocab_size = logits.shape
    size = (num_rows - 1) * logits.stride(0) + vocab_size if num_rows else 0
    flat = logits.as_strided((size,), (1,))
    carrier = _BIT_CARRIERS.get(logits.dtype)
    array: npt.NDArray[Any] = (flat if carrier is None else flat.view(carrier)).numpy()
    return array


class NativeStep:
    """``prepare``, then ``step`` once per decode step, on bound state."""

    def __init__(self, state: StepState) -> None:
        check_state(state, CPU)
        inputs = state.inputs
        vocab_size = state.requests.output_bin_counts.shape[1]
        self._vocab_size = vocab_size
        self._requests = _views(RequestStateViews, state.requests)
        self._sampling = _views(SamplingStateViews, state.sampling)
        self._stop = _views(StopStateViews, state.stop)
        self._inputs = _views(StepInputsViews, inputs)
        self._grammar = state.grammar and _views(GrammarStateViews, state.grammar)
        self._slot_mappings = inputs.slot_mappings.numpy()
        self._groups = [
            _Group(
                block_table=block_table.numpy(),
                num_blocks=state.num_blocks[group].numpy(),
                input_block_table=inputs.input_block_tables[group].numpy(),
                slots=inputs.slot_mappings[group].numpy(),
                block_size=inputs.block_sizes[group],
                sliding_reach=inputs.sliding_reach[group],
            )
            for group, block_table in enumerate(state.block_tables)
        ]
        self._scratch = tuple(
            np.empty(size, np.float32) for size in (vocab_size, vocab_size, native_sample.BLOCK)
        )
        self._rows: dict[int, tuple[WindowRows, Any]] = {}
        self._placed: dict[int, tuple[TokenInputs, Any]] = {}

    def prepare(self, rows: WindowRows, num_reqs: int) -> None:
        """Start a window of ``num_reqs`` rows; ``idx_mapping`` and ``steps_allowed`` are staged.

        A row is active if its request has not stopped and it may take steps. Gathers the
        block tables and writes the first step's inputs; an inactive row gets PAD_SLOT_ID, rows
        beyond the batch get ``seq_lens`` 0 and PAD_SLOT_ID.
        """
        views = self._views_of(rows, num_reqs)
        native_rows.prepare_rows(num_reqs, views, self._requests, self._inputs)
        for group in self._groups:
            native_rows.gather_blocks(
                num_reqs,
                views.idx_mapping,
                group.block_table,
                group.num_blocks,
                self._inputs.positions,
                group.block_size,
                group.sliding_reach,
                group.input_block_table,
            )
            group.slots[num_reqs:] = PAD_SLOT_ID
        self._map_slots(views, num_reqs)

    def step(
        self,
        logits: torch.Tensor,  # [num_reqs, V] bfloat16, float16 or float32, any row stride
        rows: WindowRows,
        num_reqs: int,
        needs: BatchNeeds,
    ) -> None:
        """``sample``, then emit the tokens, apply the stop rule and place the next inputs.

        A row ends when its request stops (``StopState``) or has taken its steps; it then keeps its
        position and gets PAD_SLOT_ID.
        """
        self.sample(logits, rows, num_reqs, needs)
        views = self._views_of(rows, num_reqs)
        native_rows.advance_rows(num_reqs, views, self._requests, self._stop, self._inputs)
        self._map_slots(views, num_reqs)
        if needs.grammar:
            self.follow(rows, num_reqs)
            native_grammar.end_rows_outside(num_reqs, views, self._grammar, self._slot_mappings)

    def sample(
        self, logits: torch.Tensor, rows: WindowRows, num_reqs: int, needs: BatchNeeds
    ) -> None:
        """Write the token of each active row to ``rows.sampled``.

        ``logits`` is left as it is, but for what a grammar forbids. The tokens are those of vLLM's
        model runner V2 sampler. A greedy row takes the first index of the largest logit after bias,
        penalties and bad words; min-p, top-k and top-p cannot change it and are skipped.
        """
        check_logits(logits, num_reqs, self._vocab_size, CPU)
        if needs.grammar:
            self.constrain(logits, rows, num_reqs)
        native_sample.sample_rows(
            flat_logits(logits),
            logits.stride(0),
            num_reqs,
            self._inputs.positions,
            self._views_of(rows, num_reqs),
            self._requests,
            self._sampling,
            needs.logprobs,
            self._scratch,
        )

    def constrain(self, logits: torch.Tensor, rows: WindowRows, num_reqs: int) -> None:
        """Mask, in place, what the requests' grammars forbid. No row has sampled a token yet."""
        native_grammar.constrain_rows(
            flat_logits(logits),
            logits.stride(0),
            _MINUS_INF[logits.dtype],
            self._vocab_size,
            num_reqs,
            self._views_of(rows, num_reqs),
            self._grammar,
        )

    def follow(self, rows: WindowRows, num_reqs: int) -> None:
        """Move the request of each row that has sampled a token on in its grammar.

        One that gets outside of the tables takes no step of a window any more.
        """
        views = self._views_of(rows, num_reqs)
        native_grammar.follow_rows(num_reqs, views, self._requests, self._grammar)

    def accept(
        self, tokens: torch.Tensor, num_tokens: torch.Tensor, rows: WindowRows, num_reqs: int
    ) -> None:
        """Take the tokens of a speculative round: of row b the first ``num_tokens[b]``.

        ``tokens`` is [num_reqs, 1 + drafts] int64, ``num_tokens`` [num_reqs] int32; the latter
        becomes 0 for a row that is not active. A row takes all of them also where one is a stop
        token or the last that it may have, as in vLLM's own step: it ends with this round, and the
        host cuts its output.
        """
        check_round(tokens, num_tokens, num_reqs, CPU)
        views = self._views_of(rows, num_reqs)
        native_rows.accept_rows(
            num_reqs, tokens.numpy(), num_tokens.numpy(), views, self._requests, self._stop
        )

    def place(self, rows: WindowRows, num_reqs: int, out: TokenInputs, tokens: RowTokens) -> None:
        """Write these tokens of each row. What lies behind the rows is padding."""
        check_place(out, tokens, num_reqs)
        width, drafts, num_drafts, back, ahead = tokens
        views = self._views_of(rows, num_reqs)
        placed = self._placed.get(id(out))
        if placed is None:
            check_token_inputs(out, CPU)
            placed = self._placed[id(out)] = (out, _views(TokenInputsViews, out))
        placed_views = placed[1]
        going_back = _NONE if back is None else back.numpy()
        native_rows.place_tokens(
            *(num_reqs, width, drafts.numpy(), num_drafts, going_back, ahead),
            *(views, self._requests, placed_views),
        )
        for number, group in enumerate(self._groups):
            native_rows.map_token_slots(
                num_reqs,
                width,
                views.active,
                placed_views.positions,
                group.input_block_table,
                group.block_size,
                placed_views.slot_mappings[number],
            )

    def _map_slots(self, views: Any, num_reqs: int) -> None:
        for group in self._groups:
            native_rows.map_slots(
                num_reqs,
                views.active,
                self._inputs.positions,
                group.input_block_table,
                group.block_size,
                group.slots,
            )

    def _views_of(self, rows: WindowRows, num_reqs: int) -> Any:
        """Views are kept for each WindowRows seen.

        A runner has two: the window's, which both slots share, and the prefill sampler's.
        """
        check_num_reqs(rows, num_reqs)
        known = self._rows.get(id(rows))
        if known is None:
            check_rows(rows, CPU)
            known = self._rows[id(rows)] = (rows, _views(WindowRowsViews, rows))
        return known[1]


def warm_up(vocab_size: int, dtype: torch.dtype, num_groups: int = 1) -> None:
    """Compile, or load from numba's cache, all that serving calls, so that no request waits.

    ``dtype`` is that of the logits. The first start on a machine takes about ten seconds.
    """
    step, rows = _smallest_step(vocab_size, num_groups)
    logits = torch.zeros(1, vocab_size, dtype=dtype)
    step.prepare(rows, 1)
    step.step(logits, rows, 1, BatchNeeds(logprobs=True))
    step.accept(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), rows, 1)
    _warm_up_place(step, rows, num_groups)


def _warm_up_place(step: NativeStep, rows: WindowRows, num_groups: int) -> None:
    out = TokenInputs.allocate(1, 2, num_groups, CPU)
    step.place(rows, 1, out, RowTokens(2, torch.zeros(1, 1, dtype=torch.int64), 1))


def _smallest_step(vocab_size: int, num_groups: int) -> tuple[NativeStep, WindowRows]:
    """A step of one greedy request with one token of room."""

    def int32(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def int64(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    requests = RequestState(
        last_sampled_tokens=int64(1, 1),
        num_computed_tokens=int32(1),
        total_len=int32(1),
        prompt_len=int32(1),
        all_token_ids=int32(1, 1),
        prompt_bin_mask=int32(1, -(-vocab_size // 32)),
        output_bin_counts=int32(1, vocab_size),
        stopped=torch.zeros(1, dtype=torch.bool),
    )
    inputs = StepInputs(
        input_ids=int32(1),
        positions=int64(1),
        seq_lens=int32(1),
        slot_mappings=int64(num_groups, 1),
        input_block_tables=tuple(int32(1, 1) for _ in range(num_groups)),
        block_sizes=(1,) * num_groups,
        sliding_reach=(0,) * num_groups,
    )
    rows = WindowRows.allocate(1, 1)
    rows.steps_allowed.fill_(1)
    state = StepState(
        requests,
        SamplingState.off(1, vocab_size, width=1),
        StopState(max_len=int32(1), num_stop_token_ids=int32(1), stop_token_ids=int32(1, 1)),
        inputs,
        block_tables=tuple(int32(1, 1) for _ in range(num_groups)),
        num_blocks=int32(num_groups, 1),
    )
    return NativeStep(state), rows
