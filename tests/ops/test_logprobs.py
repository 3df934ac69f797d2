"""Logprobs and ranks in the raw logits: of the sampled token, and of any."""

from __future__ import annotations

import pytest
import torch
from ops.options import COMBINATIONS, penalties, set_options, top_k, top_p
from ops.world import (
    DTYPES,
    Implementation,
    build_world,
    compare,
    random_logits,
    run,
)

from fusedstep.ops.reference import ReferenceStep
from fusedstep.ops.types import BatchNeeds

SIZES = [(1, torch.float32), (63, torch.float16), *((3000, dtype) for dtype in DTYPES)]


@pytest.mark.parametrize(("vocab_size", "dtype"), SIZES, ids=str)
def test_sampled_token(implementation: Implementation, vocab_size: int, dtype: torch.dtype) -> None:
    """Raw: bias, penalties and temperature are not in them; rows of either launch."""
    n = 6
    logits = random_logits(n, vocab_size, seed=9, scale=3.0).to(dtype)
    world = build_world(vocab_size, n)
    for batch_idx in range(n):
        set_options(world, batch_idx, COMBINATIONS[-1 - batch_idx], logits)
    compare(world, logits, implementation, needs=world.needs(logprobs=True))


@pytest.mark.parametrize("truncation", [False, True], ids=["plain", "truncation"])
def test_ranks_count_ties(implementation: Implementation, truncation: bool) -> None:
    """All that are at least as likely as the token, ties included."""
    logits = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0]).repeat(6, 40)
    world = build_world(200, 6)
    if truncation:
        world.sampling.top_p[::2] = 0.8
    needs = BatchNeeds(truncation=truncation, logprobs=True)
    tokens = compare(world, logits, implementation, needs=needs)
    ranks = run(world, ReferenceStep, logits, needs=needs).rows.ranks[:6].tolist()
    assert ranks == [[40, 160, 160, 160, 200][token % 5] for token in tokens]


@pytest.mark.parametrize("case", ["minus-inf", "huge", "tiny-gap"])
def test_hard_rows(implementation: Implementation, case: str) -> None:
    logits = random_logits(3, 2500, seed=1)
    if case == "minus-inf":
        logits[:, 5:] = -torch.inf
    elif case == "huge":
        logits *= 1e4
    else:
        logits = 1e4 + logits.sign()
    world = build_world(2500, 3)
    set_options(world, 1, [penalties, top_k, top_p], logits)
    compare(world, logits, implementation, needs=world.needs(logprobs=True))


def test_not_asked_not_written(implementation: Implementation) -> None:
    """NaN and -77 are what the tensors held before; ``compare`` demands them from both."""
    world = build_world(63, 3)
    out = run(
        world,
        implementation.step_class,
        random_logits(3, 63),
        needs=BatchNeeds(logprobs=False),
        device=implementation.device,
    )
    assert out.rows.logprobs.isnan().all() and (out.rows.ranks == -77).all()
