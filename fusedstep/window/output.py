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


class Fetched:
    """A finished window on its way to the host; ``tokens`` waits for it."""

    def __init__(self, slot: WindowSlot, stream: torch.cuda.Stream | None = None) -> None:
        """``stream``: of the copies where there is a GPU; they begin when the window has ended."""
        n, steps = slot.num_reqs, slot.steps_run
        parts = {
            "num_sampled": slot.rows.num_sampled[:n],
            "out_tokens": slot.rows.out_tokens[:steps, :n],
        }
        if slot.num_logprobs >= 0:
            logprobs, width = slot.logprobs, 1 + slot.num_logprobs
            parts |= {
                "token_ids": logprobs.token_ids[:steps, :n, :width],
                "logprobs": logprobs.logprobs[:steps, :n, :width],
                "ranks": logprobs.ranks[:steps, :n],
            }
        self._parts = parts
        self._ready: torch.cuda.Event | None = None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._parts = {name: _to_pinned(part) for name, part in parts.items()}
                self._ready = stream.record_event()

    def tokens(self) -> WindowTokens:
        """The window's result."""
        if self._ready is not None:
            self._ready.synchronize()
        parts = {name: part.numpy() for name, part in self._parts.items()}
        num_sampled = parts["num_sampled"].copy()
        token_ids = parts["out_tokens"].T.tolist()
        for tokens, count in zip(token_ids, num_sampled.tolist(), strict=True):
            del tokens[count:]
        if "logprobs" not in parts:
            return WindowTokens(token_ids, num_sampled, None, None, None)
        steps = len(parts["out_tokens"])
        emitted = np.arange(steps)[None, :] < num_sampled[:, None]  # [num_reqs, steps]
        return WindowTokens(
            token_ids,
            num_sampled,
            *(parts[name].swapaxes(0, 1)[emitted] for name in ("token_ids", "logprobs", "ranks")),
        )


def _to_pinned(part: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    return pinned.copy_(part, non_blocking=True)
