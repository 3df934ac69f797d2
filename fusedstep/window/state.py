"""Static buffers of a window: two slots, so that one is staged while the other runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fusedstep.ops.types import WindowRows
from fusedstep.window.output import LogprobsBuffer


@dataclass
class WindowSlot:
    """One window: staged by the host, run by the loop, read once by the output.

    ``rows`` has static addresses; the plain fields below are host values of the current window.
    """

    rows: WindowRows
    logprobs: LogprobsBuffer
    num_reqs: int = 0
    num_steps: int = 0  # longest budget of any row
    num_logprobs: int = -1  # top-n beside the sampled token; -1: nobody asked
    steps_run: int = 0  # written by the loop

    def stage(
        self,
        idx_mapping: np.ndarray,  # [num_reqs] int64, batch_idx -> req_state_idx
        budget: np.ndarray,  # [num_reqs] int32, steps each row may take
        num_logprobs: int,
    ) -> None:
        """Host part of a window; everything else happens on the device."""
        self.num_reqs = len(idx_mapping)
        self.num_steps = int(budget.max(initial=0))
        self.num_logprobs = num_logprobs
        self.steps_run = 0
        self.rows.idx_mapping[: self.num_reqs] = torch.from_numpy(idx_mapping)
        self.rows.budget[: self.num_reqs] = torch.from_numpy(budget)
        if num_logprobs >= 0:
            self.logprobs.reserve(self.num_steps, self.num_reqs, num_logprobs)


@dataclass
class WindowState:
    """Both slots; window n uses slot n mod 2."""

    slots: tuple[WindowSlot, WindowSlot]
    _count: int = field(default=0)

    @classmethod
    def allocate(cls, max_num_reqs: int, max_steps: int, device: torch.device) -> WindowState:
        """Buffers for windows of up to ``max_steps`` steps of up to ``max_num_reqs`` rows."""

        def slot() -> WindowSlot:
            return WindowSlot(
                allocate_rows(max_num_reqs, max_steps, device), LogprobsBuffer(device)
            )

        return cls((slot(), slot()))

    def next_slot(self) -> WindowSlot:
        """The slot that the last window but one used: its output has been read."""
        slot = self.slots[self._count % 2]
        self._count += 1
        return slot


def allocate_rows(max_num_reqs: int, max_steps: int, device: torch.device) -> WindowRows:
    """Static per-row tensors of one slot."""

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return WindowRows(
        idx_mapping=zeros(max_num_reqs, dtype=torch.int64),
        budget=zeros(max_num_reqs, dtype=torch.int32),
        active=zeros(max_num_reqs, dtype=torch.bool),
        sampled=zeros(max_num_reqs, dtype=torch.int64),
        num_sampled=zeros(max_num_reqs, dtype=torch.int32),
        out_tokens=zeros(max_steps, max_num_reqs, dtype=torch.int64),
    )
