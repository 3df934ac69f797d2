"""The noise that decides among tokens: its bits, its bound and its distribution."""

from __future__ import annotations

import pytest
import torch
from ops.world import Implementation, assert_close, build_world, compare, run

from fusedstep.ops import native_sample
from fusedstep.ops.reference import ReferenceStep, gumbel_noise

KEYS = [(0, 0), (-1, 5), (2**63 - 1, 2**20), (-(2**63), 2**31 - 1), (1234567890123456789, 77)]
NUM_TOKENS = 20 * 1024


@pytest.mark.parametrize(("seed", "position"), KEYS, ids=str)
def test_noise(implementation: Implementation, seed: int, position: int) -> None:
    """Native noise has the bits of the reference; Triton's logarithm is its device's own."""
    ref = gumbel_noise(seed, position, torch.arange(NUM_TOKENS))
    if implementation.name == "native":
        prefix = native_sample.hash_prefix(seed, position)
        out = [native_sample.gumbel_noise(prefix, token) for token in range(NUM_TOKENS)]
        assert_close("noise", ref=ref, out=torch.tensor(out).float(), rtol=0, atol=0)
    else:
        from ops.noise_kernel import triton_noise

        noise = triton_noise(seed, position, NUM_TOKENS, implementation.device)
        assert_close("noise", ref=ref, out=noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("seed", "position"), KEYS, ids=str)
def test_native_bounds(seed: int, position: int) -> None:
    """Native sampling skips tokens whose bound is too low: no bound may be below its noise."""
    ref = gumbel_noise(seed, position, torch.arange(NUM_TOKENS))
    bounds = torch.empty(NUM_TOKENS)
    prefix = native_sample.hash_prefix(seed, position)
    native_sample._bound_scores(torch.zeros(NUM_TOKENS).numpy(), 0, prefix, bounds.numpy())
    assert (bounds > ref).all()
    assert (bounds - ref)[ref > 4].max() < 0.1, "a loose bound makes sampling slow"


def test_the_largest_noise_wins(implementation: Implementation) -> None:
    """Of flat logits, the token is the argmax over thousands of noises."""
    world = build_world(5000, 6)
    ref = run(world, ReferenceStep, torch.zeros(6, 5000))
    for token, req in zip(ref.rows.sampled[:6], world.rows.idx_mapping[:6], strict=True):
        seed, position = (int(t[req]) for t in (world.sampling.seeds, ref.requests.total_len - 2))
        assert token == gumbel_noise(seed, position, torch.arange(5000)).argmax()
    compare(world, torch.zeros(6, 5000), implementation)


@pytest.mark.parametrize("top_p", [1.0, 0.8], ids=["all", "top_p"])
def test_sampler_follows_the_softmax(implementation: Implementation, top_p: float) -> None:
    """Chi-square of 20000 draws over 10 tokens at 9 degrees of freedom: p = 0.0001 at 33.7.

    Half of them of one seed at consecutive positions, half at one position with consecutive seeds.
    Interpreted kernels draw 60 times; other tests hold their tokens against the reference's.
    """
    num_draws, batch = (60, 60) if implementation.interpreted else (20000, 500)
    half = batch // 2
    world = build_world(10, batch).clone(implementation.device)
    world.sampling.top_p.fill_(top_p)
    step = world.bind(implementation.step_class)
    step.prepare(world.rows, batch)
    logits = torch.linspace(-1.5, 1.5, 10)
    rows, counts = logits.repeat(batch, 1).to(implementation.device), torch.zeros(10)
    reqs = world.rows.idx_mapping[:batch]
    world.sampling.seeds[reqs] = 42
    world.inputs.positions[:batch] = 7
    for first in range(0, num_draws // 2, half):
        consecutive = torch.arange(first, first + half, device=implementation.device)
        world.inputs.positions[:half] = consecutive
        world.sampling.seeds[reqs[half:]] = consecutive
        step.sample(rows, world.rows, batch, world.needs())
        counts += torch.bincount(world.rows.sampled[:batch].cpu(), minlength=10)
    kept = logits.softmax(-1).cumsum(-1) > 1 - top_p
    expected = logits.masked_fill(~kept, -torch.inf).softmax(-1) * num_draws
    assert not counts[~kept].any()
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 33.7
