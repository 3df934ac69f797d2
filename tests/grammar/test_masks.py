"""Masks equal to xgrammar's in every state: ``build`` compares them, and random walks do again.

A state's mask is taken once, after the fewest bytes that lead there. The walks come by other ways:
by tokens, with a matcher of their own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from grammar.cases import CASES, Case
from grammar.conftest import World
from grammar.walks import Differs, Walker

from fusedstep.grammar import Automaton, Limits, build

BY_NAME = {case.name: case for case in CASES}
LIMITS = Limits(states=1500, seconds=60)
CUT = {  # these have more states than the limit
    "json object",
    "anything",
    "tree",
    "property names",
    "compact json object",
    "regex negated",
    "ebnf arithmetic",
    "ebnf nested",
    "ebnf repeats",
    "lark list",
    "lark optional left",
    "tag any arguments",
}


def _walk(
    world: World, case: Case, automaton: Automaton, walks: int = 3, steps: int = 40
) -> Walker:
    walker = Walker(case.compile(world.compiler), world.vocabulary, [])
    for seed in range(walks):
        walker.compare(automaton, seed, steps)
    return walker


def _build_and_walk(world: World, case: Case) -> None:
    compiled = case.compile(world.compiler)
    automaton = build(compiled, [], world.vocabulary, LIMITS)
    walker = _walk(world, case, automaton)
    assert len(walker.visits) >= min(automaton.num_states, 10) * 0.5
    assert automaton.cut == (case.name in CUT)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bundled_tokenizer(bundled: World, case: Case) -> None:
    _build_and_walk(bundled, case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_byte_fallback_tokenizer(fallback: World, case: Case) -> None:
    _build_and_walk(fallback, case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_long_walks(bundled: World, case: Case) -> None:
    """Minutes of it: pytest -m exhaustive tests/grammar."""
    automaton = build(case.compile(bundled.compiler), [], bundled.vocabulary, Limits(seconds=60))
    _walk(bundled, case, automaton, walks=40, steps=200)


def test_walks_find_a_mask_that_is_another_states(fallback: World) -> None:
    case = BY_NAME["weather"]
    automaton = build(case.compile(fallback.compiler), [], fallback.vocabulary)
    mask_ids = automaton.mask_ids.copy()
    mask_ids[1] = mask_ids[0]
    with pytest.raises(Differs):
        _walk(fallback, case, replace(automaton, mask_ids=mask_ids))


def test_walks_find_a_changed_edge(fallback: World) -> None:
    case = BY_NAME["weather"]
    automaton = build(case.compile(fallback.compiler), [], fallback.vocabulary)
    table = automaton.next_states.copy()
    table[0, ord("{")] = 0
    with pytest.raises(Differs):
        _walk(fallback, case, replace(automaton, next_states=table))


def test_walks_find_another_whitespace(fallback: World) -> None:
    compact = BY_NAME["compact nested"].compile(fallback.compiler)
    automaton = build(compact, [], fallback.vocabulary)
    _walk(fallback, BY_NAME["compact nested"], automaton)
    with pytest.raises(Differs):
        _walk(fallback, BY_NAME["nested"], automaton)
