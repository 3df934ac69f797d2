"""The clocks on small programs whose races are known."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("triton") is None:
    pytest.skip("there is no Triton for this platform", allow_module_level=True)

from races.happens_before import Trace
from races.interpreter import Access, Site

DATA, FLAG = np.array([0]), np.array([128])
SITE = Site("kernel.py", 1, "statement", uses_value=True)


class Programs:
    """Writes a trace: what program ``p`` does next."""

    def __init__(self, num_programs: int = 3) -> None:
        self.trace = Trace(num_programs)

    def load(self, p: int, at: np.ndarray = DATA, site: Site = SITE) -> None:
        self.trace.access(Access(p, "load", at, 4, len(at) == 1, site), None)

    def store(self, p: int, at: np.ndarray = DATA, site: Site = SITE) -> None:
        values = np.zeros(len(at), np.uint32)
        self.trace.access(Access(p, "store", at, 4, len(at) == 1, site), values)

    def atomic(self, p: int, sem: str, scope: str = "gpu") -> None:
        self.trace.access(Access(p, "atomic", FLAG, 4, True, SITE, sem, scope), None)

    def barrier(self, p: int) -> None:
        self.trace.barrier(p)

    def races(self) -> int:
        return len(list(self.trace.races()))


@pytest.mark.parametrize(
    ("release", "acquire", "races"),
    [
        ("acq_rel", "acq_rel", 0),
        ("release", "acquire", 0),
        ("release", "relaxed", 1),
        ("relaxed", "acquire", 1),
        ("acquire", "release", 1),
    ],
)
def test_message(release: str, acquire: str, races: int) -> None:
    programs = Programs()
    programs.store(0)
    programs.barrier(0)
    programs.atomic(0, release)
    programs.atomic(1, acquire)
    programs.barrier(1)
    programs.load(1)
    assert programs.races() == races


@pytest.mark.parametrize("missing", [0, 1])
def test_message_without_a_barrier(missing: int) -> None:
    """A release covers what came before the barrier, an acquire what comes after one."""
    programs = Programs()
    programs.store(0)
    if missing != 0:
        programs.barrier(0)
    programs.atomic(0, "release")
    programs.atomic(1, "acquire")
    if missing != 1:
        programs.barrier(1)
    programs.load(1)
    assert programs.races() == 1


@pytest.mark.parametrize(
    ("between", "races"), [("nothing", 0), ("relaxed", 0), ("acq_rel", 0), ("cta", 1), ("store", 1)]
)
def test_a_third_program_between(between: str, races: int) -> None:
    """A relaxed atomic carries a release on; a plain store ends it, besides racing itself."""
    programs = Programs()
    programs.store(0)
    programs.barrier(0)
    programs.atomic(0, "release")
    if between == "store":
        programs.store(2, FLAG)
    elif between == "cta":
        programs.atomic(2, "relaxed", "cta")
    elif between != "nothing":
        programs.atomic(2, between)
    programs.atomic(1, "acquire")
    programs.barrier(1)
    programs.load(1)
    found = programs.races()
    assert bool(found) == bool(races)


def test_the_leader_orders_its_own_atomics() -> None:
    """A plain reset by the last to count is ordered after the others' counts; by another not."""
    programs = Programs()
    for program in range(3):
        programs.atomic(program, "acq_rel")
        programs.barrier(program)
    programs.store(2, FLAG)
    assert programs.races() == 0
    programs.store(1, FLAG)
    assert programs.races() == 2


def test_one_program_needs_barriers() -> None:
    other = replace(SITE, line=2)
    programs = Programs(1)
    programs.store(0)
    programs.load(0, site=other)
    assert programs.races() == 1
    programs = Programs(1)
    programs.store(0)
    programs.barrier(0)
    programs.load(0, site=other)
    assert programs.races() == 0


@pytest.mark.parametrize(
    ("stored", "scalar", "races"),
    [(np.arange(4) * 4, False, 0), (np.arange(4)[::-1] * 4, False, 1), (DATA, True, 1)],
)
def test_update_in_one_statement(stored: np.ndarray, scalar: bool, races: int) -> None:
    """An element has one thread if the addresses are the same; a scalar is loaded by all."""
    programs = Programs(1)
    programs.load(0, DATA if scalar else np.arange(4) * 4)
    programs.store(0, stored)
    assert programs.races() == races


def test_two_values_for_one_element() -> None:
    programs = Programs(1)
    twice = np.array([0, 0])
    programs.trace.access(Access(0, "store", twice, 4, False, SITE), np.array([1, 1], np.uint32))
    assert programs.races() == 0
    programs.trace.access(Access(0, "store", twice, 4, False, SITE), np.array([1, 2], np.uint32))
    assert programs.races() == 1
