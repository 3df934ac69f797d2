"""No launch has a race, and none depends on the order of its programs.

By hand, with every specialisation and hundreds of schedules for each (hours on two cores):

    .venv/bin/pytest tests/races -m exhaustive
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("there is no Triton for this platform", allow_module_level=True)

from races.cases import Case, all_cases, cases
from races.check import Outcome, differences, run_in_order, run_interleaved
from races.mutants import KERNELS

CASES = {case.name: case for case in cases()}
MEMORY = {"load", "store", "atomic_add", "atomic_cas", "atomic_xchg", "atomic_max", "atomic_min"}


@pytest.fixture(autouse=True)
def _on_the_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("runs in Triton's interpreter")


@cache
def in_order(name: str) -> Outcome:
    """Many tests hold something against it."""
    return run_in_order(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_no_race(name: str) -> None:
    """Programs in order, then at random by turns on weakly ordered memory: the same bits."""
    expected = in_order(name)
    assert not list(expected.races)
    outcome = run_interleaved(CASES[name], seed=1)
    assert not list(outcome.races)
    assert not differences(expected, outcome)


def test_every_access_is_checked() -> None:
    """The cases reach every load, store and atomic in the sources, and launch every kernel."""
    outcomes = [in_order(name) for name in CASES]
    reached = set().union(*(outcome.sites for outcome in outcomes))
    written, kernels = set(), set()
    for path in KERNELS.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels.add(node.name)
            if isinstance(node, ast.stmt) and _accesses_memory(node):
                written.add((path.name, node.lineno))
    assert not sorted(written - reached)
    assert not kernels - set().union(*(outcome.kernels for outcome in outcomes))


def _accesses_memory(statement: ast.stmt) -> bool:
    """The statement itself, or the head of an ``if`` or a loop, loads or stores."""
    body = {"body", "orelse", "handlers", "finalbody", "decorator_list"}
    parts = [
        child
        for name, value in ast.iter_fields(statement)
        if name not in body
        for child in (value if isinstance(value, list) else [value])
        if isinstance(child, ast.AST)
    ]
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "tl"
        and node.attr in MEMORY
        for part in parts
        for node in ast.walk(part)
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_no_race_in_many_schedules(case: Case) -> None:
    expected = run_in_order(case)
    assert not list(expected.races)
    for seed in range(20):
        for outcome in (run_in_order(case, seed), run_interleaved(case, seed)):
            assert not list(outcome.races), seed
            assert not differences(expected, outcome), seed
