"""Greedy verification of drafts, token by token."""

from __future__ import annotations

import pytest
import torch

from fusedstep.ops.greedy import verify_greedy

NUM_REQS, NUM_DRAFTS, VOCAB_SIZE = 40, 3, 300


def likeliest(row: torch.Tensor) -> int:
    """Of equal logits the lowest token, as vLLM's kernel takes it (``test_draft_kernels.py``)."""
    values = row.tolist()
    return values.index(max(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "few-ties"])
def test_a_row_takes_what_holds_and_one_more(levels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(levels)
    shape = NUM_REQS * (1 + NUM_DRAFTS), VOCAB_SIZE
    logits = torch.randint(0, levels, shape, generator=generator).to(dtype)
    best = torch.tensor([likeliest(row) for row in logits]).view(NUM_REQS, -1)
    wrong = torch.rand(NUM_REQS, NUM_DRAFTS, generator=generator) < 0.4
    drafts = best[:, :-1] + wrong
    tokens, num_tokens = verify_greedy(logits, drafts)
    assert num_tokens.dtype == torch.int32 and tokens.dtype == torch.int64
    for row in range(NUM_REQS):
        taken = []
        for draft in [*drafts[row].tolist(), None]:
            taken.append(int(best[row, len(taken)]))
            if draft != taken[-1]:
                break
        assert tokens[row, : num_tokens[row]].tolist() == taken
    assert set(num_tokens.tolist()) == set(range(1, NUM_DRAFTS + 2))
