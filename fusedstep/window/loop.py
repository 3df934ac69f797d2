"""THE loop: up to K decode steps without the host deciding anything in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from fusedstep.ops.types import WindowRows
from fusedstep.window.state import WindowSlot


class StepOps(Protocol):
    """The fused step between lm_head and the next forward (``fusedstep.ops``)."""

    def prepare(self, rows: WindowRows, num_reqs: int) -> int:
        """First step's inputs from the request state; returns the number of active rows."""

    def sample(self, logits: torch.Tensor, rows: WindowRows, num_reqs: int) -> None:
        """One token per active row from ``logits`` [num_reqs, vocab_size]."""

    def advance(self, rows: WindowRows, num_reqs: int, step: int) -> int:
        """Emit the tokens, apply the stop rule, prepare the next step; active rows left."""

    def token_logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logprobs [num_reqs, m] of ``token_ids`` [num_reqs, m] and column 0's rank [num_reqs]."""


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
    model: DecodeModel, ops: StepOps, slot: WindowSlot, cut_short: Callable[[], bool]
) -> None:
    """Run one window (eager form): up to ``slot.num_steps`` steps.

    It ends when no row is active, or after the step in which ``cut_short`` begins to say so: a
    window with a live row always has its first step.
    """
    rows, num_reqs = slot.rows, slot.num_reqs
    active = ops.prepare(rows, num_reqs)
    if not active:
        return
    model.begin(num_reqs)
    try:
        while True:
            logits = model.forward()
            ops.sample(logits, rows, num_reqs)
            if slot.num_logprobs >= 0:
                _record_logprobs(ops, logits, slot)
            active = ops.advance(rows, num_reqs, slot.steps_run)
            slot.steps_run += 1
            if not active or slot.steps_run == slot.num_steps or cut_short():
                return
            model.advance()
    finally:
        model.end()


def _record_logprobs(ops: StepOps, logits: torch.Tensor, slot: WindowSlot) -> None:
    """Logprobs of the raw logits: the sampled token first, then the top n."""
    n, step, width = slot.num_reqs, slot.steps_run, 1 + slot.num_logprobs
    token_ids = slot.logprobs.token_ids[step, :n, :width]
    token_ids[:, 0] = slot.rows.sampled[:n]
    if slot.num_logprobs:
        token_ids[:, 1:] = torch.topk(logits, slot.num_logprobs, dim=-1).indices
    logprobs, ranks = ops.token_logprobs(logits, token_ids)
    slot.logprobs.logprobs[step, :n, :width] = logprobs
    slot.logprobs.ranks[step, :n] = ranks
