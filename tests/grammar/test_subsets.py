"""The determinised table against the language of its rules, its limits, and the time it takes."""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import numpy as np
import pytest
from grammar.cases import CASES
from grammar.conftest import World

from fusedstep.grammar import NOWHERE, OUTSIDE, build
from fusedstep.grammar.left_recursion import without_left_recursion
from fusedstep.grammar.rules import Rules, parse, read_rules
from fusedstep.grammar.subsets import FEW, MANY, determinise

BY_NAME = {case.name: case for case in CASES}


def _table(rules: Rules, states: int = 500, work: int = 10**6, room: int = FEW) -> Any:
    return determinise(
        rules.first_edges,
        rules.edges,
        rules.starts,
        rules.accepting,
        rules.repeats,
        rules.root,
        states,
        work,
        room,
    )


def _listing(*rules: tuple[int, str, str]) -> str:
    """Rules (start, ends, edges) as xgrammar lists them; the first is the root."""
    return "".join(
        f"Rule {number}: {'root' if number == 0 else f'r{number}'}, FSM: "
        f"CompactFSM(num_states=99, start={start}, end=[{ends}], edges=[\n{edges}])\n"
        for number, (start, ends, edges) in enumerate(rules)
    )


def _accepted(rules: Rules, longest: int) -> set[str]:
    table, accepts, *_ = _table(rules)
    found = set()
    for length in range(longest + 1):
        for text in product("ab", repeat=length):
            state = 0
            for character in text:
                state = table[state, ord(character)] if state >= 0 else state
            assert state != OUTSIDE
            if state >= 0 and accepts[state]:
                found.add("".join(text))
    return found


REPEATED = (10, "11", "10: ['a'->11, 'b'->12]\n11: []\n12: ['b'->11]\n")  # "a" or "bb"


@pytest.mark.parametrize(("least", "most"), [(0, 0), (0, 2), (1, 1), (2, 3), (3, 3)])
def test_repetitions(least: int, most: int) -> None:
    """Of "a" or "bb", by the meaning of words instead of xgrammar's."""
    root = (0, "1", f"0: [Repeat(rule=1, min={least}, max={most})->1]\n1: []\n")
    words = {
        "".join(word)
        for count in range(least, most + 1)
        for word in product(["a", "bb"], repeat=count)
    }
    assert _accepted(parse(_listing(root, REPEATED)), 6) == words


def test_repetitions_inside_repetitions_and_of_nothing() -> None:
    root = (0, "1", "0: [Repeat(rule=1, min=2, max=2)->1]\n1: []\n")
    inner = (2, "3", "2: [Repeat(rule=2, min=0, max=2)->4]\n3: []\n4: ['b'->3, Eps->3]\n")
    letter = (5, "6", "5: ['a'->6]\n6: []\n")
    one = {"a" * count + end for count in range(3) for end in ("", "b")}
    words = {first + second for first in one for second in one}
    assert _accepted(parse(_listing(root, inner, letter)), 6) == words


def test_left_recursion_is_a_loop() -> None:
    """x: x "b" | x "ab" | "a" """
    rules = parse(
        _listing((0, "1", "0: [Rule(0)->2, 'a'->1]\n1: []\n2: ['b'->1, 'a'->3]\n3: ['b'->1]\n"))
    )
    assert not len(_table(rules)[0])
    words = {
        "a" + "".join(rest) for count in range(6) for rest in product(["b", "ab"], repeat=count)
    }
    found = _accepted(without_left_recursion(rules), 6)
    assert found == {word for word in words if len(word) <= 6}


def test_left_recursion_through_a_nullable_beginning_stays_outside() -> None:
    rules = parse(
        _listing(
            (0, "1", "0: [Rule(1)->2]\n1: []\n2: [Rule(0)->3, 'a'->1]\n3: ['b'->1]\n"),
            (4, "4, 5", "4: ['b'->5]\n5: []\n"),
        )
    )
    assert not len(_table(without_left_recursion(rules))[0])


def test_rules_that_only_call_each_other_end() -> None:
    """root: r3 r1, r1: r2, r2: r1, r3: "a"; nothing can follow the "a"."""
    rules = parse(
        _listing(
            (0, "2", "0: [Rule(3)->1]\n1: [Rule(1)->2]\n2: []\n"),
            (3, "4", "3: [Rule(2)->4]\n4: []\n"),
            (5, "6", "5: [Rule(1)->6]\n6: []\n"),
            (7, "8", "7: ['a'->8]\n8: []\n"),
        )
    )
    table, accepts, *_ = _table(rules)
    assert len(table) == 2 and table[0, ord("a")] == 1
    assert (table[1] == NOWHERE).all() and not accepts.any()


def test_stacks_that_mean_the_same_are_one(bundled: World) -> None:
    """A first and a later value of an object go on alike: so few states hold this nesting."""
    rules = read_rules(BY_NAME["json object"].compile(bundled.compiler))
    table = _table(rules, states=2048, room=MANY)[0]
    state = 0
    for byte in b'{"a": {"b": [{"c": [1, 2]}]}}':
        state = table[state, byte]
        assert state >= 0


@pytest.mark.parametrize("name", ["weather", "json object", "regex counted", "tag auto"])
def test_what_is_cut_is_the_beginning_of_the_whole(bundled: World, name: str) -> None:
    rules = read_rules(BY_NAME[name].compile(bundled.compiler))
    whole, accepts, parents, via, full = _table(rules, states=700, room=MANY)
    assert not full
    for limits in ({"states": 50}, {"work": 60}, {"room": 64}):
        table, *others, _ = _table(rules, **({"states": 700, "room": MANY} | limits))
        size = len(table)
        assert 1 < size < len(whole)
        assert (table == np.where(whole[:size] >= size, OUTSIDE, whole[:size])).all()
        for other, longer in zip(others, (accepts, parents, via), strict=True):
            assert (other == longer[:size]).all()
    assert _table(rules, states=700, room=64)[-1]


def test_states_know_their_parents(bundled: World) -> None:
    rules = read_rules(BY_NAME["ten fields"].compile(bundled.compiler))
    table, _, parents, via, _ = _table(rules)
    assert (table[parents[1:], via[1:]] == np.arange(1, len(table))).all()
    assert (np.diff(parents) >= 0).all() and parents[0] == NOWHERE


def test_ten_fields_take_less_than_20_ms(bundled: World) -> None:
    """On the builder's own thread; its time on a CPU does not depend on what else runs."""
    compiled = BY_NAME["ten fields"].compile(bundled.compiler)
    times = []
    for _ in range(15):
        start = time.thread_time()
        build(compiled, [], bundled.vocabulary)
        times.append(time.thread_time() - start)
    assert sorted(times)[7] < 0.020
