"""A window's result where its steps are speculative rounds: several tokens of a row in each."""

from __future__ import annotations

import torch

from fusedstep.policy import MAX_STEPS
from fusedstep.window.host_copies import HostCopies
from fusedstep.window.output import WindowTokens


class RoundTokens:
    """The tokens of each round of the window that runs, at fixed addresses on the device."""

    def __init__(self, max_num_reqs: int, width: int, device: torch.device) -> None:
        """``width``: the most tokens that a round gives a row."""
        rounds = MAX_STEPS // width
        shape = rounds, max_num_reqs, width
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.num_tokens = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)  # of the coming round

    def begin(self) -> None:
        """A window starts. A round that does not run has no token."""
        self.num_tokens.zero_()
        self.number.zero_()

    def add(self, tokens: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """A round's: [num_reqs, width] int64 and [num_reqs] int32."""
        num_reqs = len(tokens)
        self.tokens[:, :num_reqs].index_copy_(0, self.number, tokens[None])
        self.num_tokens[:, :num_reqs].index_copy_(0, self.number, num_tokens[None])
        self.number += 1


class HostRounds:
    """A window's rounds, out of the way of the next one's, for the host at the window's end.

    There are two in turn: the host reads one while the other is written.
    """

    def __init__(self, max_num_reqs: int, width: int, device: torch.device) -> None:
        rounds = MAX_STEPS // width
        self.num_rounds = 0
        self.copies = HostCopies(device)
        self.tokens = self.copies.buffer("tokens", (rounds, max_num_reqs, width), torch.int64)
        self.num_tokens = self.copies.buffer("num_tokens", (rounds, max_num_reqs), torch.int32)

    def keep(self, taken: RoundTokens, rounds: int, stream: torch.cuda.Stream | None) -> None:
        """The window's work, up to so many rounds, is enqueued: bring its result to the host on
        ``stream``."""
        self.num_rounds = n = rounds
        self.tokens[:n].copy_(taken.tokens[:n])
        self.num_tokens[:n].copy_(taken.num_tokens[:n])
        self.copies.bring({"tokens": self.tokens[:n], "num_tokens": self.num_tokens[:n]}, stream)

    def read(self, num_reqs: int) -> WindowTokens:
        """Wait for the copies."""
        host = self.copies.arrived()
        tokens = host["tokens"][: self.num_rounds, :num_reqs].tolist()
        counts = host["num_tokens"][: self.num_rounds, :num_reqs]
        of_rows: list[list[int]] = [[] for _ in range(num_reqs)]
        rounds: list[list[int]] = [[] for _ in range(num_reqs)]
        for of_round, numbers in zip(tokens, counts.tolist(), strict=True):
            for row, number in enumerate(numbers):
                if number:
                    of_rows[row] += of_round[row][:number]
                    rounds[row].append(number)
        num_sampled = counts.sum(axis=0, dtype=counts.dtype)
        return WindowTokens(of_rows, num_sampled, None, None, None, rounds)
