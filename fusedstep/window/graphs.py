"""Recorded decode steps: what the replay, unrolled and WHILE forms of the loop enqueue."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import torch

from fusedstep.loop_forms import LoopForm
from fusedstep.ops.types import BatchNeeds, WindowRows
from fusedstep.window.loop import DecodeModel, StepOps, Steps, decode_step
from fusedstep.window.state import WindowSlot, WindowState

# What a recorded step can do, the least first: nothing but temperature and seeds, everything but
# logprobs of the sampled tokens, or everything.
VARIANTS = (BatchNeeds.none(), BatchNeeds(), BatchNeeds(logprobs=True))
# That, under the grammars of structured output: recorded where requests can have some.
GRAMMAR = BatchNeeds(logprobs=True, grammar=True)
# Steps of one graph of the unrolled form. It cannot be stopped within them.
UNROLLED_STEPS = 8

Key = tuple[int, int, BatchNeeds]  # rows with padding, adapters, variant


class RecordableModel(DecodeModel, Protocol):
    """A model whose steps can be recorded."""

    def capturing(self, num_reqs: int, num_loras: int) -> AbstractContextManager[None]:
        """``plan`` and ``forward`` are about to be recorded for batches of ``num_reqs`` rows with
        ``num_loras`` adapters."""

    def begin_captured(self, num_reqs: int) -> None:
        """A window of recorded steps starts: what they read beside the step inputs."""


class Graph(Protocol):
    """Device work that was recorded."""

    def replay(self) -> None:
        """Enqueue it once more, on the same addresses."""


class Recorder(Protocol):
    """Records the device work that ``body`` enqueues, without running it."""

    def record(self, body: Callable[[], object]) -> Graph:
        """The work of one call."""

    def record_loop(
        self,
        body: Callable[[], object],
        num_active: torch.Tensor,  # [1] int32
        seen: torch.Tensor,  # [1] int64
    ) -> Graph:
        """The work of a call, repeated on the device while ``num_active`` is above 0 and no more
        requests have arrived than ``seen``; at least once."""


def variant(needs: BatchNeeds) -> BatchNeeds:
    """The least of the variants that does all that ``needs`` asks for.

    More than the needs costs a little time, less gives wrong tokens.
    """
    return next(v for v in (*VARIANTS, GRAMMAR) if v.covers(needs))


class WindowGraphs:
    """The recorded steps of one form, by padded batch size, number of LoRA adapters and variant.

    A batch that wants what no variant does takes eager steps: logprobs other than those of the
    sampled tokens, for one.
    """

    def __init__(
        self,
        form: LoopForm,
        model: RecordableModel,
        ops: StepOps,
        state: WindowState,
        variants: tuple[BatchNeeds, ...] = VARIANTS,
    ) -> None:
        """``form``: one that is recorded."""
        self.form, self.variants = form, variants
        self.model, self.ops, self.state = model, ops, state
        self._recorder: Recorder | None = None
        self._single: dict[Key, Graph] = {}
        self._many: dict[Key, Graph] = {}  # unrolled or a WHILE loop

    def record(self, recorder: Recorder, num_rows: int, num_loras: int = 0) -> None:
        """Record the steps of batches of ``num_rows`` rows, each after a run that compiles."""
        self._recorder = recorder  # whose memory the graphs use
        rows = self.state.rows
        for needs in self.variants:
            key = num_rows, num_loras, needs
            capturing = partial(self.model.capturing, num_rows, num_loras)
            step = partial(decode_step, self.model, self.ops, rows, num_rows, needs)
            self._idle_rows(rows, num_rows)
            with capturing():
                step()
            if self.form is LoopForm.WHILE:
                with capturing():
                    self._many[key] = recorder.record_loop(step, rows.num_active, self.state.seen)
                continue
            with capturing():
                self._single[key] = recorder.record(step)
            if self.form is LoopForm.UNROLLED:
                with capturing():
                    self._many[key] = recorder.record(partial(_repeat, step))

    def begin(self, slot: WindowSlot) -> Steps | None:
        """A window starts: the steps that are enqueued for its batch, or None."""
        needs = next((v for v in self.variants if v.covers(slot.needs)), None)
        if needs is None:
            return None
        key = slot.num_rows, slot.num_loras, needs
        single, many = self._single.get(key), self._many.get(key)
        steps: Steps | None = None
        if self.form is LoopForm.WHILE and many is not None:
            steps = partial(_whole_window, many)
        elif single is not None:
            steps = partial(_one_or_more, single, many)
        if steps is not None:
            self.model.begin_captured(slot.num_rows)
        return steps

    def _idle_rows(self, rows: WindowRows, num_rows: int) -> None:
        """Only padding: what is run before the recording touches no request and no KV slot."""
        rows.idx_mapping[:num_rows].fill_(-1)
        self.ops.prepare(rows, num_rows)


def _repeat(step: Callable[[], object]) -> None:
    for _ in range(UNROLLED_STEPS):
        step()


def _whole_window(loop: Graph, remaining: int) -> int:
    """The device ends it: no row may take more steps than the window has."""
    loop.replay()
    return remaining


def _one_or_more(single: Graph, many: Graph | None, remaining: int) -> int:
    if many is not None and remaining >= UNROLLED_STEPS:
        many.replay()
        return UNROLLED_STEPS
    single.replay()
    return 1
