"""Made-up grammars for the step operations."""

from __future__ import annotations

import torch

from fusedstep.ops.types import FREE, OUTSIDE, GrammarState

NUM_STATES, NUM_MASKS, ALPHABET = 30, 9, 6
NO_BYTES = 5  # a special token


def build_grammar(max_num_reqs: int, vocab_size: int, *, seed: int = 0) -> GrammarState:
    """Made-up automata over six bytes, with masks that have nothing to do with them.

    One edge in 20 leads nowhere, one in 12 out of the tables.
    """
    generator = torch.Generator().manual_seed(seed)

    def randint(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    next_states = torch.full((NUM_STATES, 256), FREE)
    edges = randint(0, NUM_STATES, NUM_STATES, ALPHABET)
    chance = torch.rand(edges.shape, generator=generator)
    edges[chance < 1 / 20] = FREE
    edges[chance > 11 / 12] = OUTSIDE
    next_states[:, 128 - ALPHABET // 2 : 128 + ALPHABET // 2] = edges  # bytes have no sign
    lengths = randint(1, 5, vocab_size)
    lengths[NO_BYTES] = 0
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    data = randint(128 - ALPHABET // 2, 128 + ALPHABET // 2, int(starts[-1]) + 3)
    masks = randint(-(2**31), 2**31, NUM_MASKS, -(-vocab_size // 32))
    masks[0] = -1
    return GrammarState(
        states=randint(0, NUM_STATES, max_num_reqs).int(),
        reasoning_ends=torch.full((max_num_reqs, 2), -1, dtype=torch.int32),
        next_states=next_states.int(),
        mask_ids=randint(0, NUM_MASKS, NUM_STATES).int(),
        masks=masks.int(),
        token_starts=starts.int(),
        token_bytes=data.to(torch.uint8),
    )
