"""Scratch memory of the Triton step, and how a row's token ids are split over programs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedstep.kernels.sample import BUCKET

# Token ids per program of the two launches, of a small and of a large batch: with few rows, many
# small programs keep the GPU busy.
SAMPLE_BLOCKS = (1024, 2048)
TRUNCATE_BLOCKS = (4096, 16384)
MANY_PROGRAMS = 512
CANDIDATES = 1024


class Scratch(NamedTuple):
    """Scratch memory of a row; ``fusedstep/kernels/winner.py`` says what orders its accesses.

    Entries per split or candidate: written by every program of a row, read by the last to arrive.
    Entries per row: written by the last program of the first launch, read by the second launch.
    """

    arrivals: torch.Tensor  # [R] int32, zero between launches
    best_scores: torch.Tensor  # [R, NUM_SPLITS] float32, of each split's winner in greedy rows
    best_tokens: torch.Tensor  # [R, NUM_SPLITS] int32
    others_best: torch.Tensor  # [R, NUM_SPLITS] float32, near score of the best of the others
    split_max: torch.Tensor  # [R, NUM_SPLITS] float32, of each split's raw logits
    split_weights: torch.Tensor  # [R, NUM_SPLITS] float32, sum(exp(raw logit - split_max))
    weights: torch.Tensor  # [R, NUM_SPLITS] float32
    weights_up_to: torch.Tensor  # [R, NUM_SPLITS] float32
    bucket_max: torch.Tensor  # [R, BUCKETS] float32
    row_max: torch.Tensor  # [R] float32
    floors: torch.Tensor  # [R] float32, what min-p keeps
    bounds: torch.Tensor  # [R] float32, of the candidates
    winners: torch.Tensor  # [R] int32
    winner_values: torch.Tensor  # [R] float32
    num_candidates: torch.Tensor  # [R] int32
    candidates: torch.Tensor  # [R, CANDIDATES] int32
    candidate_values: torch.Tensor  # [R, CANDIDATES] float32
    sorted: torch.Tensor  # [R, CANDIDATES] int32
    sorted_values: torch.Tensor  # [R, CANDIDATES] float32
    adjusted: torch.Tensor  # [R, V] float32, rows with bias, penalties or bad words, or handed over
    sampled_logits: torch.Tensor  # [R] float32, raw, of the sampled tokens; NaN of rows at rest
    limit_k: torch.Tensor  # [R] int32, of rows that are handed over, else V
    limit_p: torch.Tensor  # [R] float32, the same, else 1


def allocate_scratch(max_num_reqs: int, vocab_size: int, device: torch.device) -> Scratch:
    max_splits = -(-vocab_size // block_size(vocab_size, 1, SAMPLE_BLOCKS))

    def floats(size: int) -> torch.Tensor:
        return torch.zeros(max_num_reqs, size, device=device)

    def ints(size: int) -> torch.Tensor:
        return torch.zeros(max_num_reqs, size, dtype=torch.int32, device=device)

    per_split = (
        "best_scores",
        "others_best",
        "split_max",
        "split_weights",
        "weights",
        "weights_up_to",
    )
    per_row = ("row_max", "floors", "bounds", "winner_values", "sampled_logits")
    return Scratch(
        **{name: floats(max_splits) for name in per_split},
        **{name: floats(1) for name in per_row},
        **{name: ints(1) for name in ("arrivals", "winners", "num_candidates")},
        best_tokens=ints(max_splits),
        bucket_max=floats(num_buckets(vocab_size)),
        candidates=ints(CANDIDATES),
        candidate_values=floats(CANDIDATES),
        sorted=ints(CANDIDATES),
        sorted_values=floats(CANDIDATES),
        adjusted=floats(vocab_size),
        limit_k=torch.full((max_num_reqs,), vocab_size, dtype=torch.int32, device=device),
        limit_p=torch.ones(max_num_reqs, device=device),
    )


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` >= 1."""
    return 1 << (n - 1).bit_length()


def block_size(vocab_size: int, num_reqs: int, sizes: tuple[int, int]) -> int:
    """Token ids per program: the small size while the batch would have few programs."""
    small, large = sizes
    few = -(-vocab_size // large) * num_reqs < MANY_PROGRAMS
    return max(min(small if few else large, power_of_two(vocab_size)), int(BUCKET.value))


def num_buckets(vocab_size: int) -> int:
    """Room for the buckets of either block size."""
    block = max(SAMPLE_BLOCKS)
    return power_of_two(-(-vocab_size // block) * block // int(BUCKET.value))
