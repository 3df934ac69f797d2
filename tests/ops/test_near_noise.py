"""Near noise: its bound holds for every hash, and what is near to a tie is scored exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops.world import Implementation, build_world, compare, run

from fusedstep.ops import reference
from fusedstep.ops.dispatch import load

pytest.importorskip("triton", reason="there is no Triton for this platform")
import triton.language as tl
from ops.noise_kernel import no_bound, noise_and_scores

from fusedstep.kernels import noise, winner

NUM_TOKENS = 1024  # one split
LOG2_ERROR = 2.0**-22  # lg2.approx.f32: absolute between 1/2 and 2, else relative
MARGIN = 14.1e-6  # of SCORE_ERROR: the exact score's own errors and those of its sum, see there


def log2(x: torch.Tensor, sign: int) -> torch.Tensor:
    """The largest (1) or smallest (-1) that the device may say."""
    exact = x.double().log2()
    error = torch.where((x > 0.5) & (x < 2), LOG2_ERROR, exact.abs() * LOG2_ERROR)
    return exact + sign * error


def near_noise(random: torch.Tensor, sign: int) -> torch.Tensor:
    """As ``near_scores`` has it of float32 hashes, with the worst errors; float64."""
    rounding = 1 + sign * 2.0**-24
    small = (random.double() * (2.0**-32 / math.log(2))).float().double() / rounding**2
    direct = ((1 + 2.0**-21) - random.double() * 2.0**-32).float()
    large = -log2(direct, sign)
    return -log2(torch.maximum(small, large), -sign) * math.log(2) + noise.NEAR_SHIFT.value


def hashes(step: int) -> Iterator[torch.Tensor]:
    """Every ``step``-th of the hashes that differ as float32: 2**24 + 8 * 2**23, and the last."""
    for exponent in range(24, 33):
        first = 1 if exponent == 24 else 2 ** (exponent - 1)
        spacing = 2 ** max(exponent - 24, 0)
        span = 2**exponent - first
        for start in range(0, span, spacing << 22):
            stop = min(start + (spacing << 22), span)
            yield first + torch.arange(start, stop, spacing * step)
    yield torch.tensor([2**32 - 1])


def check_bound(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for hashed in hashes(step):
        monkeypatch.setattr(reference, "murmur3", lambda *_, hashed=hashed: hashed)
        exact = reference.gumbel_noise(0, 0, hashed).double()
        random = hashed.float()
        below = exact - near_noise(random, -1)
        assert below.max() + MARGIN <= float(noise.SCORE_ERROR.value)
        above = near_noise(random, 1) - exact
        assert (above < 6e-4)[(random > 2**13) & (random < 0.999 * 2**32)].all()


def test_near_noise_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    check_bound(1009, monkeypatch)


@pytest.mark.exhaustive
def test_near_noise_is_bounded_for_every_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    check_bound(1, monkeypatch)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-3, 1e3])
def test_near_scores(device: str, temperature: float) -> None:
    """The compiled (interpreted) formula keeps what the bound promises of it."""
    logits = torch.randn(NUM_TOKENS) * 5
    exact, near = noise_and_scores(-5, 9, logits, temperature, device)
    scores = logits / temperature + exact
    differences = (near / temperature).double() + noise.NEAR_SHIFT.value - scores
    error = noise.SCORE_ERROR.value + noise.SCORE_RELATIVE_ERROR.value * scores.abs()
    assert (differences > -error).all()
    assert differences.median() < 6e-4 + error.median()


@pytest.fixture
def step(device: str) -> Implementation:
    return Implementation("triton", load("triton"), device)


class Split:
    """One row whose vocabulary is one split, its noise, and scores as the kernel rounds them."""

    def __init__(self, seed: int, temperature: float, device: str) -> None:
        self.world = build_world(NUM_TOKENS, 1)
        self.world.sampling.seeds.fill_(seed)
        self.world.sampling.temperature.fill_(temperature)
        self.temperature = torch.tensor(temperature)
        req = self.world.rows.idx_mapping[0]
        position = int(self.world.requests.num_computed_tokens[req])
        self.noise, self._near = noise_and_scores(
            seed, position, torch.zeros(NUM_TOKENS), temperature, device
        )
        self.above = self.near(torch.tensor(0.0)) - self.noise
        self.logits = torch.full((1, NUM_TOKENS), -50.0)

    def near(self, logits: torch.Tensor, tokens: Any = slice(None)) -> torch.Tensor:
        return (logits + self._near[tokens]) / self.temperature + noise.NEAR_SHIFT.value

    def scores(self, logits: torch.Tensor, tokens: Any = slice(None)) -> torch.Tensor:
        return logits / self.temperature + self.noise[tokens]


@pytest.mark.parametrize("seed", range(4))
def test_near_tie_is_scored_exactly(
    step: Implementation, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best near score is not the best score; without the second look the token is another."""
    split = Split(seed, 0.7, step.device)
    seems, wins = int(split.above.argmax()), int(split.above.argmin())
    split.logits[0, [seems, wins]] = 0.7 * (9 - split.noise[[seems, wins]])
    split.logits[0, wins] += 1e-4
    assert compare(split.world, split.logits, step) == [wins]
    if step.interpreted:
        monkeypatch.setattr(winner, "score_bound", no_bound)
        assert run(split.world, step.step_class, split.logits).rows.sampled[0] == seems


def test_a_bound_without_its_errors_is_too_low(
    step: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding of large logits makes a near score less than the score: here one of two equal."""
    split = Split(1, 0.51, step.device)
    half = NUM_TOKENS // 2  # of two equal ones the first wins
    seems = half + int(split.above[half:].argmax())
    others = 1030 + torch.arange(1 << 18) * 2.0**-13
    equal = split.scores(others, seems)
    for wins in split.above[:half].abs().argsort()[:8].tolist():
        logits = 1040 + torch.arange(1 << 10) * 2.0**-13
        scores = split.scores(logits, wins)
        low = (split.near(logits, wins) < scores) & torch.isin(scores, equal)
        if low.any():
            break
    split.logits[0, wins] = logits[low][0]
    split.logits[0, seems] = others[equal == scores[low][0]][0]
    assert compare(split.world, split.logits, step) == [wins]
    if step.interpreted:
        for name in ("SCORE_ERROR", "SCORE_RELATIVE_ERROR"):
            monkeypatch.setattr(noise, name, tl.constexpr(0.0))
        assert run(split.world, step.step_class, split.logits).rows.sampled[0] == seems
