"""THE loop: up to K decode steps without the host deciding anything in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from fusedstep.ops.types import BatchNeeds, WindowRows
from fusedstep.window.pace import HostPace, Pace
from fusedstep.window.state import WindowSlot

HOST_PACE = HostPace()

# Takes down what requests want to know of a step: its raw logits, the window.
Record = Callable[[torch.Tensor, WindowSlot], None]
# Enqueues at least one and at most the given number of steps; returns how many.
Steps = Callable[[int], int]


class StepOps(Protocol):
    """The fused step between lm_head and the next forward (``fusedstep.ops``)."""

    def prepare(self, rows: WindowRows, num_reqs: int) -> None:
        """First step's inputs from the request state, and the active flags."""

    def step(
        self, logits: torch.Tensor, rows: WindowRows, num_reqs: int, needs: BatchNeeds
    ) -> None:
        """One token per active row, emitted; the stop rule; the next step's inputs."""


class DecodeModel(Protocol):
    """A model that decodes the coming step of each row from what the device has reached."""

    def begin(self, num_reqs: int) -> None:
        """A window of eager steps starts: describe the batch to the attention."""

    def plan(self) -> None:
        """The attention metadata of the coming step, from the lengths the device has reached."""

    def forward(self) -> torch.Tensor:
        """One decode step: write K and V, attend, lm_head -> logits [num_reqs, vocab_size]."""

    def end(self) -> None:
        """The window is over."""


class Graphs(Protocol):
    """Decode steps that were recorded before (``fusedstep.window.graphs``)."""

    def begin(self, slot: WindowSlot) -> Steps | None:
        """A window starts: the steps for its batch, or None."""


def run_window(
    model: DecodeModel,
    ops: StepOps,
    slot: WindowSlot,
    cut_short: Callable[[], bool],
    pace: Pace = HOST_PACE,
    graphs: Graphs | None = None,
    record: Record | None = None,
) -> None:
    """Run one window: enqueue up to ``slot.num_steps`` steps.

    With ``record``, which every step calls, they are eager.

    Stops when no row is active, or after the step during which ``cut_short()`` became true. If it
    is already true before the first step and the slot allows it, no step runs. On a GPU up to
    ``pace.ahead`` extra steps may run; they emit no token.
    """
    rows = slot.rows
    pace.begin()
    ops.prepare(rows, slot.num_rows)
    if not pace.goes_on(rows) or (slot.may_give_way and cut_short()):
        return
    with _steps(model, ops, slot, graphs, record) as steps:
        while True:
            slot.steps_run += steps(slot.num_steps - slot.steps_run)
            if slot.steps_run == slot.num_steps or not pace.goes_on(rows) or cut_short():
                return


def decode_step(
    model: DecodeModel, ops: StepOps, rows: WindowRows, num_rows: int, needs: BatchNeeds
) -> torch.Tensor:
    """One decode step, the same in every form of the loop. Returns its logits."""
    model.plan()
    logits = model.forward()
    ops.step(logits, rows, num_rows, needs)
    if needs.logprobs:
        rows.keep_logprobs(num_rows)
    return logits


@contextmanager
def _steps(
    model: DecodeModel,
    ops: StepOps,
    slot: WindowSlot,
    graphs: Graphs | None,
    record: Record | None,
) -> Iterator[Steps]:
    """Recorded steps where there are some for this batch, else eager ones."""
    recorded = None if graphs is None or record is not None else graphs.begin(slot)
    if recorded is not None:
        yield recorded
        return

    def eager(_: int) -> int:
        logits = decode_step(model, ops, slot.rows, slot.num_rows, slot.needs)
        if record is not None:
            record(logits, slot)
        return 1

    model.begin(slot.num_rows)
    try:
        yield eager
    finally:
        model.end()
