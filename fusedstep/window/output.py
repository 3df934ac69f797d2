"""What a window leaves for the host: tokens and logprobs of its steps, read once at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from fusedstep.window.state import WindowSlot


class LogprobsBuffer:
    """Logprobs of a window's steps, column 0 the sampled token; grows to the largest asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.token_ids = torch.empty(0, 0, 1, dtype=torch.int64, device=device)  # [K, B, 1 + n]
        self.logprobs = torch.empty(0, 0, 1, dtype=torch.float32, device=device)  # [K, B, 1 + n]
        self.ranks = torch.empty(0, 0, dtype=torch.int64, device=device)  # [K, B]

    def reserve(self, num_steps: int, num_reqs: int, num_logprobs: int) -> None:
        """Room for one window; allocates only when a window asks for more than any before."""
        wanted = (num_steps, num_reqs, 1 + num_logprobs)
        shape = tuple(max(s) for s in zip(self.token_ids.shape, wanted, strict=True))
        if shape == self.token_ids.shape:
            return
        self.token_ids = torch.empty(shape, dtype=torch.int64, device=self.device)
        self.logprobs = torch.empty(shape, dtype=torch.float32, device=self.device)
        self.ranks = torch.empty(shape[:2], dtype=torch.int64, device=self.device)


@dataclass(frozen=True)
class WindowTokens:
    """Host copy of a window's result, by batch_idx; row b has ``num_sampled[b]`` valid steps."""

    token_ids: list[list[int]]  # ragged [num_reqs, num_sampled]
    num_sampled: np.ndarray  # [num_reqs] int32
    logprob_token_ids: np.ndarray | None  # [sum(num_sampled), 1 + n] int64, request-major
    logprobs: np.ndarray | None  # [sum(num_sampled), 1 + n] float32
    ranks: np.ndarray | None  # [sum(num_sampled)] int64


def read(slot: WindowSlot) -> WindowTokens:
    """Copy a finished window out of its slot."""
    n, steps = slot.num_reqs, slot.steps_run
    num_sampled = slot.rows.num_sampled[:n].cpu().numpy().copy()
    token_ids = slot.rows.out_tokens[:steps, :n].t().tolist()
    for tokens, count in zip(token_ids, num_sampled.tolist(), strict=True):
        del tokens[count:]
    if slot.num_logprobs < 0:
        return WindowTokens(token_ids, num_sampled, None, None, None)
    width = 1 + slot.num_logprobs
    emitted = np.arange(steps)[None, :] < num_sampled[:, None]  # [num_reqs, steps]

    def request_major(buffer: torch.Tensor) -> np.ndarray:
        return buffer[:steps, :n].transpose(0, 1).cpu().numpy()[emitted]

    return WindowTokens(
        token_ids,
        num_sampled,
        request_major(slot.logprobs.token_ids[..., :width]),
        request_major(slot.logprobs.logprobs[..., :width]),
        request_major(slot.logprobs.ranks),
    )
