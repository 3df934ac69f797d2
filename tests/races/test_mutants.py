"""Each fault in the memory order of a kernel is found, and the statements that race are named."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("there is no Triton for this platform", allow_module_level=True)

from races.cases import cases
from races.check import Outcome, differences, run_in_order, run_interleaved
from races.mutants import MUTANTS, BarrierMutant, Mutant, barrier_mutants, mutated

CASES = {case.name: case for case in cases()}


@cache
def in_order(name: str) -> Outcome:
    return run_in_order(CASES[name])


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


# Which case shows the barriers of a file; if it does not, one of the others must.
SHOWS = {
    "accept.py": "accept",
    "adjust.py": "step-adjustment",
    "grammar.py": "step-grammar-2",
    "truncate.py": "step-truncation",
}
OTHERS = ("step-plain", "step-adjustment", "step-truncation", "step-everything")
OTHERS += ("step-everything-handed-over", "attention-q1")


@pytest.mark.parametrize("mutant", barrier_mutants(), ids=str)
def test_every_barrier_is_needed(mutant: BarrierMutant, tmp_path: Path) -> None:
    """Without it two statements around its line race in one program, or a release misses one."""
    with mutated(mutant, tmp_path):
        for name in dict.fromkeys((SHOWS.get(mutant.file, OTHERS[0]), *OTHERS)):
            races = run_in_order(CASES[name]).races
            if any("barrier" in text for text in races):
                print(name, *races, sep="\n")
                return
    pytest.fail("no case shows what it orders; if that is nothing, begin its comment '# compiler:'")


def test_cache_modifiers_order_nothing(tmp_path: Path) -> None:
    """A kernel without ``.cg`` has no race: the checker counts nothing that it promises."""
    with mutated(Mutant("no-cg", "winner.py", ', cache_modifier=".cg")', ")"), tmp_path):
        assert not run_in_order(CASES["step-plain"]).races


WEAK = {
    *(f"{name}-step-plain" for name in ("relaxed", "no-release", "no-acquire", "early-reset")),
    *(f"{name}-attention-q1" for name in ("relaxed", "no-acquire", "last-but-one")),
}


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in WEAK], ids=str)
def test_weak_memory_shows_it(mutant: Mutant, tmp_path: Path) -> None:
    """A tool that knows no clocks agrees: some schedule of a few gives another result."""
    case, expected = CASES[mutant.case], in_order(mutant.case)
    with mutated(mutant, tmp_path):
        assert any(differences(expected, run_interleaved(case, seed)) for seed in range(8))


def test_a_mutant_that_changes_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 times, not once"):
        Mutant("gone", "winner.py", "no such text", "").change("source")
