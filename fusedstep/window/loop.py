"""THE loop: up to K decode steps without the host deciding anything in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from fusedstep.ops.types import BatchNeeds, WindowRows
from fusedstep.window.pace import HostPace, Pace
from fusedstep.window.state import WindowSlot

HOST_PACE = HostPace()


class StepOps(Protocol):
    """The fused step between lm_head and the next forward (``fusedstep.ops``)."""

    def prepare(self, rows: WindowRows, num_reqs: int) -> None:
        """First step's inputs from the request state, and who is active."""

    def step(
        self, logits: torch.Tensor, rows: WindowRows, num_reqs: int, needs: BatchNeeds
    ) -> None:
        """One token per active row, emitted; the stop rule; the next step's inputs."""

    def sample(
        self, logits: torch.Tensor, rows: WindowRows, num_reqs: int, needs: BatchNeeds
    ) -> None:
        """The tokens alone, for steps outside a window."""

    def token_logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Logprobs [num_reqs, m] of ``token_ids`` [num_reqs, m]."""


class DecodeModel(Protocol):
    """A model that decodes one token per row from the static step inputs."""

    def begin(self, num_reqs: int) -> None:
        """A window starts: describe the batch to the attention."""

    def forward(self) -> torch.Tensor:
        """One decode step: write K and V, attend, lm_head -> logits [num_reqs, vocab_size]."""

    def advance(self) -> None:
        """The rows grew by one token: move the attention metadata along."""

    def end(self) -> None:
        """The window is over."""


def run_window(
    model: DecodeModel,
    ops: StepOps,
    slot: WindowSlot,
    cut_short: Callable[[], bool],
    pace: Pace = HOST_PACE,
) -> None:
    """Run one window: enqueue up to ``slot.num_steps`` steps.

    It ends when no row is active, or after the step in which ``cut_short`` begins to say so: a
    window with a live row always has its first step. Where the host runs ahead of the device,
    ``pace`` says by how much, and with it how many steps too many there may be; those give nothing.
    """
    rows, num_reqs = slot.rows, slot.num_rows
    pace.begin()
    ops.prepare(rows, num_reqs)
    if not pace.goes_on(rows):
        return
    model.begin(num_reqs)
    try:
        while True:
            logits = model.forward()
            ops.step(logits, rows, num_reqs, slot.needs)
            if slot.needs.logprobs:
                _record_logprobs(ops, logits, slot)
            slot.steps_run += 1
            if slot.steps_run == slot.num_steps or not pace.goes_on(rows) or cut_short():
                return
            model.advance()
    finally:
        model.end()


def _record_logprobs(ops: StepOps, logits: torch.Tensor, slot: WindowSlot) -> None:
    """Logprobs of the raw logits: the sampled token first, then the top n."""
    n, step, width = slot.num_rows, slot.steps_run, 1 + slot.num_logprobs
    token_ids = slot.logprobs.token_ids[step, :n, :width]
    logprobs = slot.logprobs.logprobs[step, :n, :width]
    token_ids[:, 0] = slot.rows.sampled[:n]
    logprobs[:, 0] = slot.rows.logprobs[:n]
    slot.logprobs.ranks[step, :n] = slot.rows.ranks[:n]
    if slot.num_logprobs:
        token_ids[:, 1:] = torch.topk(logits, slot.num_logprobs, dim=-1).indices
        logprobs[:, 1:] = ops.token_logprobs(logits, token_ids[:, 1:])
