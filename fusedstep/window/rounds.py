"""A window's result where its steps are speculative rounds: several tokens of a row in each."""

from __future__ import annotations

import numpy as np
import torch

from fusedstep.policy import MAX_STEPS
from fusedstep.window.host_copies import HostCopies
from fusedstep.window.output import LogprobBuffers, Round, WindowTokens


class RoundTokens:
    """The tokens of each round of the window that runs, at fixed addresses on the device."""

    def __init__(self, max_num_reqs: int, width: int, device: torch.device) -> None:
        """``width``: the most tokens that a round gives a row."""
        rounds = MAX_STEPS // width
        shape = rounds, max_num_reqs, width
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.num_tokens = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        self.num_drafts = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)  # of the coming round

    def begin(self) -> None:
        """A window starts. A round that does not run has no token."""
        self.num_tokens.zero_()
        self.number.zero_()

    def add(
        self,
        tokens: torch.Tensor,  # [num_reqs, width] int64
        num_tokens: torch.Tensor,  # [num_reqs] int32
        num_drafts: torch.Tensor | None = None,  # [num_reqs] that grammars take; None: all
    ) -> None:
        """A round's."""
        num_reqs = len(tokens)
        if num_drafts is not None:
            drafts = num_drafts.to(torch.int32)[None]
            self.num_drafts[:, :num_reqs].index_copy_(0, self.number, drafts)
        self.tokens[:, :num_reqs].index_copy_(0, self.number, tokens[None])
        self.num_tokens[:, :num_reqs].index_copy_(0, self.number, num_tokens[None])
        self.number += 1


class HostRounds:
    """A window's rounds, out of the way of the next one's, for the host at the window's end.

    There are two in turn: the host reads one while the other is written.
    """

    def __init__(self, max_num_reqs: int, width: int, device: torch.device) -> None:
        rounds = MAX_STEPS // width
        self.width = width
        self.num_rounds, self.num_logprobs = 0, -1
        self.has_grammars = False
        self.copies = HostCopies(device)
        self.tokens = self.copies.buffer("tokens", (rounds, max_num_reqs, width), torch.int64)
        self.num_tokens = self.copies.buffer("num_tokens", (rounds, max_num_reqs), torch.int32)
        self.num_drafts = self.copies.buffer("num_drafts", (rounds, max_num_reqs), torch.int32)
        self.logprobs = LogprobBuffers(self.copies)  # a row for each token of a round

    def begin(
        self, num_rounds: int, num_reqs: int, num_logprobs: int, *, has_grammars: bool
    ) -> None:
        """A window is staged. ``num_logprobs``: beside each token's own; -1: nobody asks."""
        self.num_logprobs, self.has_grammars = num_logprobs, has_grammars
        if num_logprobs >= 0:
            self.logprobs.reserve(num_rounds, num_reqs * self.width, num_logprobs)

    def keep(self, taken: RoundTokens, rounds: int, stream: torch.cuda.Stream | None) -> None:
        """The window's work, up to so many rounds, is enqueued: bring its result to the host on
        ``stream``."""
        self.num_rounds = n = rounds
        self.tokens[:n].copy_(taken.tokens[:n])
        self.num_tokens[:n].copy_(taken.num_tokens[:n])
        parts = {"tokens": self.tokens[:n], "num_tokens": self.num_tokens[:n]}
        if self.has_grammars:
            self.num_drafts[:n].copy_(taken.num_drafts[:n])
            parts["num_drafts"] = self.num_drafts[:n]
        if self.num_logprobs >= 0:
            parts |= self.logprobs.of_steps(n)
        self.copies.bring(parts, stream)

    def read(self, num_reqs: int) -> WindowTokens:
        """Wait for the copies."""
        host = self.copies.arrived()
        tokens = host["tokens"][: self.num_rounds, :num_reqs].tolist()
        counts = host["num_tokens"][: self.num_rounds, :num_reqs]
        drafts = np.full_like(counts, self.width - 1)
        if self.has_grammars:
            drafts = host["num_drafts"][: self.num_rounds, :num_reqs]
        of_rows: list[list[int]] = [[] for _ in range(num_reqs)]
        rounds: list[list[Round]] = [[] for _ in range(num_reqs)]
        for of_round, *numbers in zip(tokens, counts.tolist(), drafts.tolist(), strict=True):
            for row, (number, drafted) in enumerate(zip(*numbers, strict=True)):
                if number:
                    of_rows[row] += of_round[row][:number]
                    rounds[row].append((number, drafted))
        num_sampled = counts.sum(axis=0, dtype=counts.dtype)
        if self.num_logprobs < 0:
            return WindowTokens(of_rows, num_sampled, None, None, None, rounds)
        return WindowTokens(of_rows, num_sampled, *self._logprobs(host, counts), rounds)

    def _logprobs(
        self, host: dict[str, np.ndarray], counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the tokens that were taken, by request: token ids, logprobs and ranks."""
        num_rounds, num_reqs = counts.shape
        taken = np.arange(self.width) < counts.T[:, :, None]  # [num_reqs, num_rounds, width]

        def of_requests(name: str) -> np.ndarray:
            rows = host[name][:num_rounds, : num_reqs * self.width]
            by_round = rows.reshape(num_rounds, num_reqs, self.width, *rows.shape[2:])
            return by_round.swapaxes(0, 1)[taken]

        n = 1 + self.num_logprobs
        return of_requests("token_ids")[:, :n], of_requests("logprobs")[:, :n], of_requests("ranks")
