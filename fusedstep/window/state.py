"""Static buffers of a window: what the device works on, and two slots that are staged in turn."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fusedstep.ops.types import BatchNeeds, WindowRows
from fusedstep.window import arrivals
from fusedstep.window.output import WindowBuffers, WindowTokens
from fusedstep.window.pinned import host_zeros


class Staging:
    """Host side of a window's rows: pinned where there is a GPU, so that no copy waits."""

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.idx_mapping = host_zeros(max_num_reqs, dtype=torch.int64, pinned=pinned)
        self.steps_allowed = host_zeros(max_num_reqs, dtype=torch.int32, pinned=pinned)
        self.stop_weight = host_zeros(1, dtype=torch.int32, pinned=pinned)
        self.seen = host_zeros(1, dtype=torch.int64, pinned=pinned)
        self._idx_mapping_np = self.idx_mapping.numpy()
        self._steps_allowed_np = self.steps_allowed.numpy()
        self._stop_weight_np, self._seen_np = self.stop_weight.numpy(), self.seen.numpy()

    def copy_to(
        self,
        rows: WindowRows,
        seen: torch.Tensor,  # [1] int64
        idx_mapping: np.ndarray,  # [num_reqs] int64
        steps_allowed: np.ndarray,  # [num_reqs] int32
        num_rows: int,
        arrivals_seen: int,
        num_stops: int,
    ) -> None:
        """Rows from num_reqs on are padding. The device must have read the window before."""
        num_reqs = len(idx_mapping)
        self._idx_mapping_np[:num_reqs] = idx_mapping
        self._idx_mapping_np[num_reqs:num_rows] = -1
        self._steps_allowed_np[:num_reqs] = steps_allowed
        self._steps_allowed_np[num_reqs:num_rows] = 0
        self._stop_weight_np[0] = -(-num_reqs // num_stops) if num_stops else 1
        self._seen_np[0] = arrivals_seen
        rows.idx_mapping[:num_rows].copy_(self.idx_mapping[:num_rows], non_blocking=True)
        rows.steps_allowed[:num_rows].copy_(self.steps_allowed[:num_rows], non_blocking=True)
        rows.stop_weight.copy_(self.stop_weight, non_blocking=True)
        seen.copy_(self.seen, non_blocking=True)


@dataclass
class WindowSlot:
    """One window: staged by the host, run by the loop, read once by the output.

    ``rows`` and ``seen`` have static addresses and belong to the window that runs; the plain fields
    below are host values of the slot's window.
    """

    rows: WindowRows
    seen: torch.Tensor  # [1] int64, arrivals that the window's scheduler had seen
    output: WindowBuffers
    staging: Staging
    num_reqs: int = 0
    num_rows: int = 0  # with padding rows
    num_loras: int = 0  # adapters, as the model tells its graphs apart by them
    num_steps: int = 0  # the most that any row may take
    num_logprobs: int = -1  # top-n beside the sampled token; -1: nobody asked
    needs: BatchNeeds = field(default_factory=BatchNeeds)
    arrivals_seen: int = arrivals.NEVER_END
    gives_way: bool = True  # the model allows that no step runs
    steps_run: int = 0  # enqueued, written by the loop

    @property
    def may_give_way(self) -> bool:
        """May it end before its first step? Not a one-step turn: each turn must get somewhere."""
        return (
            self.gives_way
            and self.num_steps > 1
            and self.arrivals_seen != arrivals.END_AFTER_ONE_STEP
        )

    def shorten(self, num_steps: int) -> None:
        """It is staged, and gets fewer steps than its rows may take."""
        self.num_steps = num_steps

    def stage(
        self,
        idx_mapping: np.ndarray,  # [num_reqs] int64, batch_idx -> req_state_idx
        steps_allowed: np.ndarray,  # [num_reqs] int32, steps each row may take
        num_logprobs: int,
        needs: BatchNeeds,
        num_rows: int | None = None,  # with padding rows, num_reqs without
        arrivals_seen: int = arrivals.NEVER_END,
        num_stops: int = 0,
        num_loras: int = 0,
        gives_way: bool = True,
    ) -> None:
        """Host part of a window; everything else happens on the device.

        ``num_stops``: the window ends after the step in which the last of about so many rows stops;
        0: when no row is left.
        """
        self.num_reqs = len(idx_mapping)
        self.num_rows = self.num_reqs if num_rows is None else num_rows
        self.num_loras = num_loras
        self.num_steps = int(steps_allowed.max(initial=0))
        self.num_logprobs = num_logprobs
        self.needs = needs
        self.arrivals_seen, self.gives_way = arrivals_seen, gives_way
        self.steps_run = 0
        self.staging.copy_to(
            self.rows,
            self.seen,
            idx_mapping,
            steps_allowed,
            self.num_rows,
            arrivals_seen,
            num_stops,
        )
        if num_logprobs >= 0:
            self.output.logprobs.reserve(self.num_steps, self.num_rows, num_logprobs)


@dataclass
class WindowState:
    """Tensors of the running window, and the slots: window n uses slot n mod 2."""

    rows: WindowRows
    seen: torch.Tensor  # [1] int64
    slots: tuple[WindowSlot, WindowSlot]
    _count: int = field(default=0)

    @classmethod
    def allocate(cls, max_num_reqs: int, max_steps: int, device: torch.device) -> WindowState:
        """Buffers for windows of up to ``max_steps`` steps of up to ``max_num_reqs`` rows."""
        rows = WindowRows.allocate(max_num_reqs, max_steps, device)
        seen = torch.zeros(1, dtype=torch.int64, device=device)

        def slot() -> WindowSlot:
            return WindowSlot(
                rows,
                seen,
                WindowBuffers(max_steps, max_num_reqs, device),
                Staging(max_num_reqs, device),
            )

        return cls(rows, seen, (slot(), slot()))

    def next_slot(self) -> WindowSlot:
        """The slot that the last window but one used: its output has been read."""
        slot = self.slots[self._count % 2]
        self._count += 1
        return slot


class Fetched:
    """A finished window on its way to the host; ``tokens`` waits for it."""

    def __init__(self, slot: WindowSlot, stream: torch.cuda.Stream | None = None) -> None:
        """``stream``: of the copies where there is a GPU; they begin when the window has ended."""
        slot.output.keep(
            slot.rows,
            slot.steps_run,
            stream,
            logprobs=slot.num_logprobs >= 0,
            sampled_alone=slot.needs.logprobs,
        )
        self._output = slot.output
        self._shape = slot.num_reqs, slot.steps_run, slot.num_logprobs

    def tokens(self) -> WindowTokens:
        """The window's result, before its slot is staged again."""
        return self._output.read(*self._shape)
