"""A window's result for the host: tokens and logprobs of its steps, read once at its end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fusedstep.ops.types import WindowRows
from fusedstep.window.host_copies import HostCopies

Round = tuple[int, int]  # the tokens that a speculative round gave a row, and its drafts


class LogprobBuffers:
    """Logprobs of each row in each step of a window: those of the sampled token, in column 0, and
    of n others. They grow to the largest asked for.
    """

    def __init__(self, copies: HostCopies) -> None:
        self.copies = copies
        self._allocate((0, 0, 1))

    def reserve(self, num_steps: int, num_rows: int, num_logprobs: int) -> None:
        """Room for one window; allocates only when a window asks for more than any before."""
        wanted = (num_steps, num_rows, 1 + num_logprobs)
        shape = tuple(max(s) for s in zip(self.token_ids.shape, wanted, strict=True))
        if shape != self.token_ids.shape:
            self._allocate(shape)

    def _allocate(self, shape: tuple[int, ...]) -> None:
        buffer = self.copies.buffer
        self.token_ids = buffer("token_ids", shape, torch.int64)  # [K, B, 1 + n]
        self.logprobs = buffer("logprobs", shape, torch.float32)  # [K, B, 1 + n]
        self.ranks = buffer("ranks", shape[:2], torch.int64)  # [K, B]

    def take_down(
        self,
        step: int,
        token_ids: torch.Tensor,  # [num_rows, 1 + n]
        logprobs: torch.Tensor,  # [num_rows, 1 + n]
        ranks: torch.Tensor,  # [num_rows]
    ) -> None:
        num_rows, width = logprobs.shape
        self.token_ids[step, :num_rows, :width] = token_ids
        self.logprobs[step, :num_rows, :width] = logprobs
        self.ranks[step, :num_rows] = ranks

    def of_steps(self, num_steps: int) -> dict[str, torch.Tensor]:
        """The parts that are brought to the host."""
        parts = {"token_ids": self.token_ids, "logprobs": self.logprobs, "ranks": self.ranks}
        return {name: part[:num_steps] for name, part in parts.items()}


class WindowBuffers:
    """A window's result, out of its rows' way: the next window may reuse them."""

    def __init__(self, max_steps: int, max_num_reqs: int, device: torch.device) -> None:
        self.copies = HostCopies(device)
        self.num_sampled = self.copies.buffer("num_sampled", (max_num_reqs,), torch.int32)  # [B]
        self.out_tokens = self.copies.buffer("out_tokens", (max_steps, max_num_reqs), torch.int64)
        self.logprobs = LogprobBuffers(self.copies)

    def keep(
        self,
        rows: WindowRows,
        steps: int,  # that were enqueued
        stream: torch.cuda.Stream | None,
        *,
        logprobs: bool,  # asked for: they lie in these buffers already,
        sampled_alone: bool,  # or, those of the sampled tokens, with the window's rows
    ) -> None:
        """The window's work is enqueued: keep its result, to be copied on ``stream``."""
        self.num_sampled.copy_(rows.num_sampled)
        self.out_tokens[:steps].copy_(rows.out_tokens[:steps])
        if sampled_alone:
            taken = self.logprobs
            n = taken.ranks.shape[1]
            taken.token_ids[:steps, :, 0] = rows.out_tokens[:steps, :n]
            taken.logprobs[:steps, :, 0] = rows.out_logprobs[:steps, :n]
            taken.ranks[:steps] = rows.out_ranks[:steps, :n]
        of_steps = {"out_tokens": self.out_tokens[:steps]}
        if logprobs:
            of_steps |= self.logprobs.of_steps(steps)
        self.copies.bring({"num_sampled": self.num_sampled} | of_steps, stream)

    def read(self, num_reqs: int, steps: int, num_logprobs: int) -> WindowTokens:
        """Wait for the copies; the result has memory of its own."""
        host = self.copies.arrived()
        num_sampled = host["num_sampled"][:num_reqs].copy()
        token_ids = host["out_tokens"][:steps, :num_reqs].T.tolist()
        for tokens, count in zip(token_ids, num_sampled.tolist(), strict=True):
            del tokens[count:]
        if num_logprobs < 0:
            return WindowTokens(token_ids, num_sampled, None, None, None)
        emitted = np.arange(steps)[None, :] < num_sampled[:, None]  # [num_reqs, steps]
        batch, width = np.s_[:steps, :num_reqs], np.s_[:, : 1 + num_logprobs]
        return WindowTokens(
            token_ids,
            num_sampled,
            host["token_ids"][batch].swapaxes(0, 1)[emitted][width],
            host["logprobs"][batch].swapaxes(0, 1)[emitted][width],
            host["ranks"][batch].swapaxes(0, 1)[emitted],
        )


@dataclass(frozen=True)
class WindowTokens:
    """Host copy of a window's result, by batch_idx; row b has ``num_sampled[b]`` valid steps."""

    token_ids: list[list[int]]  # ragged [num_reqs, num_sampled]
    num_sampled: np.ndarray  # [num_reqs] int32
    logprob_token_ids: np.ndarray | None  # [sum(num_sampled), 1 + n] int64, request-major
    logprobs: np.ndarray | None  # [sum(num_sampled), 1 + n] float32
    ranks: np.ndarray | None  # [sum(num_sampled)] int64
    rounds: list[list[Round]] | None = None  # speculative ones, that gave tokens

    @property
    def num_steps(self) -> int:
        """Steps of the window that gave a token."""
        if self.rounds is not None:
            return max(map(len, self.rounds), default=0)
        return int(self.num_sampled.max(initial=0))
