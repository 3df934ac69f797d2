"""Top-k, top-p and min-p where they are hard: ties, flat rows, thousands of tokens."""

from __future__ import annotations

import pytest
import torch
from ops.world import (
    Implementation,
    World,
    build_world,
    compare,
    random_logits,
    run,
)

from fusedstep.ops.reference import ReferenceStep


def truncated_world(
    vocab_size: int,
    top_k: list[int],
    top_p: list[float],
    *,
    min_p: float = 0.0,
    temperature: float = 1.0,
    seed: int = 0,
) -> World:
    """A row per (top_k, top_p), at different seeds; a top_k of 0 is none."""
    world = build_world(vocab_size, len(top_k), seed=seed)
    reqs = world.rows.idx_mapping[: len(top_k)]
    world.sampling.top_k[reqs] = torch.tensor([k or vocab_size for k in top_k]).int()
    world.sampling.top_p[reqs] = torch.tensor(top_p)
    world.sampling.min_p.fill_(min_p)
    world.sampling.temperature.fill_(temperature)
    return world


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize(
    ("k", "p"), [(5, 1.0), (0, 0.3), (0, 0.9003), (20, 0.5), (62, 0.97)], ids=str
)
def test_ties_at_the_boundary(
    implementation: Implementation, k: int, p: float, levels: int
) -> None:
    """Few distinct logits: all ties of the k-th stay, of top-p's those with the lower ids go."""
    n = 8 if implementation.interpreted else 64
    generator = torch.Generator().manual_seed(levels)
    logits = torch.randint(0, levels, (n, 63), generator=generator) / 4
    world = truncated_world(63, [k] * n, [p] * n, seed=levels)
    tokens = compare(world, logits, implementation)
    assert len(set(tokens)) > 3, "the noise should have had a choice"


@pytest.mark.parametrize("k", [0, 4])
def test_top_p_at_exact_quarters(implementation: Implementation, k: int) -> None:
    """Of four equal tokens, p = 1/4 keeps one, 1/2 two: who is exactly at 1 - p is out."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0, 0.0]]).repeat(24, 1)
    world = truncated_world(5, [k] * 24, [0.25, 0.5, 0.75] * 8)
    tokens = compare(world, logits, implementation)
    assert [set(tokens[i::3]) for i in range(3)] == [{4}, {3, 4}, {2, 3, 4}]


@pytest.mark.parametrize("vocab_size", [200, 3000])
@pytest.mark.parametrize(
    ("k", "p", "m"),
    [(0, 0.01, 0.0), (0, 0.2, 0.0), (5, 1.0, 0.0), (50, 0.1, 0.0), (0, 0.05, 0.99)],
    ids=str,
)
def test_first_choices_are_rejected(
    implementation: Implementation, k: int, p: float, m: float, vocab_size: int
) -> None:
    """A nearly flat row: the winner over all is outside, and the next one, and the next one."""
    n = 2 if implementation.interpreted else 32
    logits = random_logits(n, vocab_size, seed=1, scale=0.02)
    world = truncated_world(vocab_size, [k] * n, [p] * n, min_p=m)
    free = run(truncated_world(vocab_size, [0] * n, [1.0] * n), ReferenceStep, logits)
    assert compare(world, logits, implementation) != free.rows.sampled[:n].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top_k_in_the_thousands(implementation: Implementation, dtype: torch.dtype) -> None:
    """Distinct logits, and 16-bit ones with hundreds of ties; alone and with top-p."""
    top_k = [1023, 1024, 1025, 2000, 2999, 5000, 1500, 1024]
    top_p = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.1]
    vocab_size = 5001
    logits = random_logits(len(top_k), vocab_size, seed=2, scale=0.1).to(dtype)
    world = truncated_world(vocab_size, top_k, top_p)
    compare(world, logits, implementation)


@pytest.mark.parametrize("p", [1.0, 0.6])
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_top_k_of_a_full_vocabulary(compiled: Implementation, scale: float, p: float) -> None:
    top_k = [1, 50, 1024, 1025, 5000, 40000, 151935]
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_logits(len(top_k), 151936, seed=2, scale=scale).to(dtype)
        compare(truncated_world(151936, top_k, [p] * len(top_k)), logits, compiled)


@pytest.mark.parametrize("k", [0, 5, 2499])
def test_ties_that_noise_cannot_break(implementation: Implementation, k: int) -> None:
    """At 1e8 the noise is lost: of equal scores the first token wins, wherever it is."""
    logits = torch.full((5, 2500), -1e8)
    logits[:, [100, 101, 1100, 2100]] = 1e8
    world = truncated_world(2500, [k] * 5, [1.0, 0.9, 0.6, 0.4, 0.1])
    assert compare(world, logits, implementation) == [100, 100, 101, 1100, 2100]


def test_flat_row_with_more_ties_than_top_k(implementation: Implementation) -> None:
    """2500 tokens share the largest logit: top-k 40 keeps them all."""
    logits = torch.zeros(4, 4000)
    logits[:, 700:3200] = 1.0
    world = truncated_world(4000, [40, 1, 3000, 40], [1.0, 1.0, 1.0, 0.3])
    tokens = compare(world, logits, implementation)
    assert all(700 <= token < 3200 for token in tokens[:2])


@pytest.mark.parametrize("k", [0, 30])
@pytest.mark.parametrize("p", [1e-9, 1e-6, 1e-3, 0.999999], ids="{:g}".format)
def test_extreme_top_p(implementation: Implementation, p: float, k: int) -> None:
    """One token stays at least; almost all stay at most."""
    logits = random_logits(4, 500, seed=4, scale=2.0)
    logits[1] = 0
    logits[2, 400:] = -torch.inf
    logits[3, :] = -1e4
    logits[3, 250] = 1e4
    compare(truncated_world(500, [k] * 4, [p] * 4), logits, implementation)


@pytest.mark.parametrize("num_reqs", [1, 4])
def test_launches_of_large_batches(
    implementation: Implementation, num_reqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton cuts the rows of a large batch into larger blocks; here with a small one."""
    if implementation.name == "triton":
        monkeypatch.setattr("fusedstep.ops.triton_scratch.MANY_PROGRAMS", 1)
    logits = random_logits(num_reqs, 20000, seed=5, scale=0.5)
    top_k, top_p = [0, 50, 2000, 1024], [0.7, 0.9, 1.0, 0.05]
    world = truncated_world(20000, top_k[:num_reqs], top_p[:num_reqs])
    world.sampling.frequency_penalty.fill_(0.5)
    compare(world, logits, implementation, needs=world.needs(logprobs=True))


@pytest.mark.parametrize("temperature", [1e-6, 0.3, 1e4], ids="{:g}".format)
def test_truncation_follows_the_temperature(
    implementation: Implementation, temperature: float
) -> None:
    top_k, top_p = [0, 3, 0, 100, 3, 0], [0.5, 1.0, 0.9, 0.8, 0.4, 1e-6]
    logits = random_logits(6, 300, seed=6)
    for min_p in (0.0, 0.2, 1.0):
        world = truncated_world(300, top_k, top_p, min_p=min_p, temperature=temperature)
        compare(world, logits, implementation)


def test_peaked_row(implementation: Implementation) -> None:
    """Gaps far beyond what exp can show: weights of 0 in the sums."""
    logits = torch.linspace(-3000, 3000, 800).repeat(5, 1)
    logits[1:] = logits[1:, torch.randperm(800, generator=torch.Generator().manual_seed(0))]
    world = truncated_world(800, [0, 40, 0, 40, 799], [0.9, 1.0, 0.1, 0.99, 1.0])
    compare(world, logits, implementation)
