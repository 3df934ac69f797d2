"""Each fault in the memory order of a kernel is found, and the statements that race are named."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("there is no Triton for this platform", allow_module_level=True)

from races.cases import cases
from races.check import differences, run_in_order, run_interleaved
from races.mutants import MUTANTS, BarrierMutant, Mutant, barrier_mutants, mutated

CASES = {case.name: case for case in cases()}


@pytest.fixture(autouse=True)
def _on_the_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("runs in Triton's interpreter")


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_race_is_named(mutant: Mutant, tmp_path: Path) -> None:
    """One run in order is enough: a race needs no unlucky schedule to be seen."""
    with mutated(mutant, tmp_path):
        races = run_in_order(CASES[mutant.case]).races
    assert races
    print(*races, sep="\n")
    for text in mutant.named:
        assert any(text in description for description in races), text


@pytest.mark.parametrize("mutant", barrier_mutants(), ids=str)
def test_every_barrier_is_needed(mutant: BarrierMutant, tmp_path: Path) -> None:
    """Without it two statements around its line race in one program, or a release misses one."""
    with mutated(mutant, tmp_path):
        races = run_in_order(CASES[mutant.case]).races
    print(*races, sep="\n")
    assert [text for text in races if "barrier" in text]


def test_cache_modifiers_order_nothing(tmp_path: Path) -> None:
    """A kernel without ``.cg`` has no race: the checker counts nothing that it promises."""
    with mutated(Mutant("no-cg", "winner.py", ', cache_modifier=".cg")', ")"), tmp_path):
        assert not run_in_order(CASES["step-plain"]).races


WEAK = {"relaxed", "no-release", "no-acquire", "early-reset", "last-but-one"}


@pytest.mark.parametrize(
    "mutant",
    [
        mutant
        for mutant in MUTANTS
        if mutant.name.removesuffix(f"-{mutant.case}") in WEAK and mutant.case != "step-truncation"
    ],
    ids=str,
)
def test_weak_memory_shows_it(mutant: Mutant, tmp_path: Path) -> None:
    """A tool that knows no clocks agrees: some schedule of a few gives another result."""
    case = CASES[mutant.case]
    expected = run_in_order(case)
    with mutated(mutant, tmp_path):
        assert any(differences(expected, run_interleaved(case, seed)) for seed in range(8))


def test_a_mutant_that_changes_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 times, not once"):
        Mutant("gone", "winner.py", "no such text", "").change("source")
