"""A window's result where its steps are speculative rounds: several tokens of a row in each."""

from __future__ import annotations

import torch

from fusedstep.policy import MAX_STEPS


class RoundTokens:
    """The tokens of each round, on a device whose memory is the host's.

    A window has two of them in turn: the host reads one while the next is written.
    """

    def __init__(self, max_num_reqs: int, width: int, device: torch.device) -> None:
        """``width``: the most tokens that a round gives a row."""
        self.num_rounds = 0
        rounds = MAX_STEPS // width
        self.tokens = torch.zeros(rounds, max_num_reqs, width, dtype=torch.int64, device=device)
        self.num_tokens = torch.zeros(rounds, max_num_reqs, dtype=torch.int32, device=device)

    def begin(self) -> None:
        """A window starts: the one before last has been read."""
        self.num_rounds = 0

    def add(self, tokens: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """A round's: [num_reqs, width] int64 and [num_reqs] int32."""
        num_reqs = len(tokens)
        self.tokens[self.num_rounds, :num_reqs] = tokens
        self.num_tokens[self.num_rounds, :num_reqs] = num_tokens
        self.num_rounds += 1

    def read(self, num_reqs: int) -> tuple[list[list[int]], list[list[int]]]:
        """For each row its tokens, and how many each of its rounds gave."""
        tokens = self.tokens[: self.num_rounds, :num_reqs].tolist()
        counts = self.num_tokens[: self.num_rounds, :num_reqs].tolist()
        of_rows: list[list[int]] = [[] for _ in range(num_reqs)]
        rounds: list[list[int]] = [[] for _ in range(num_reqs)]
        for of_round, numbers in zip(tokens, counts, strict=True):
            for row, number in enumerate(numbers):
                if number:
                    of_rows[row] += of_round[row][:number]
                    rounds[row].append(number)
        return of_rows, rounds
