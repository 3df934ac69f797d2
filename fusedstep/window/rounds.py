"""A window's result where its steps are speculative rounds: several tokens of a row in each."""

from __future__ import annotations

import torch

from fusedstep.policy import MAX_STEPS
from fusedstep.window.host_copies import HostCopies
from fusedstep.window.output import WindowTokens


class RoundTokens:
    """The tokens of each round, on the device, and for the host at the window's end.

    A window has two of them in turn: the host reads one while the next is written.
    """

    def __init__(self, max_num_reqs: int, width: int, device: torch.device) -> None:
        """``width``: the most tokens that a round gives a row."""
        self.num_rounds = 0
        rounds = MAX_STEPS // width
        self.copies = HostCopies(device)
        self.tokens = self.copies.buffer("tokens", (rounds, max_num_reqs, width), torch.int64)
        self.num_tokens = self.copies.buffer("num_tokens", (rounds, max_num_reqs), torch.int32)

    def begin(self) -> None:
        """A window starts: the one before last has been read."""
        self.num_rounds = 0

    def add(self, tokens: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """A round's: [num_reqs, width] int64 and [num_reqs] int32."""
        num_reqs = len(tokens)
        self.tokens[self.num_rounds, :num_reqs] = tokens
        self.num_tokens[self.num_rounds, :num_reqs] = num_tokens
        self.num_rounds += 1

    def keep(self, stream: torch.cuda.Stream | None) -> None:
        """The window's work is enqueued: bring its result to the host on ``stream``."""
        n = self.num_rounds
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
