"""Reads the byte automata of a compiled grammar: one for each rule, with calls to other rules.

xgrammar gives them in two forms. ``serialize_json`` repeats the whole automaton for each rule
(10 MB for one string with maxLength 200); the listing for its own tests is short, so that is read.
A wrong reading cannot pass: ``build`` compares every state with xgrammar's matcher.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusedstep.grammar.subsets import CALL, EPSILON, REPEAT

if TYPE_CHECKING:
    import xgrammar

FORMAT = "v16"  # of xgrammar 0.2.8
ROOT = "root"

Ints = npt.NDArray[np.int32]

_RULE = re.compile(
    r"Rule (\d+): ([^\s,]+), FSM: CompactFSM\(num_states=(\d+), start=(\d+), "
    r"end=\[([\d, ]*)\], edges=\[\n"
)
_STATE = re.compile(r"(\d+): \[(.*)\]\n")
_CHARACTER = r"(\\x[0-9a-f]{2}|\\.|[^\\])"
_EDGE = re.compile(
    rf"(?:'{_CHARACTER}'|\[{_CHARACTER}-{_CHARACTER}\]|(Eps)|Rule\((\d+)\)"
    r"|Repeat\(rule=(\d+), min=(\d+), max=(-?\d+)\)|([A-Za-z]+)[^>]*)->(\d+)(?:, |$)"
)
_ATTRIBUTES = re.compile(r"^([^\s:=]+?)\[(.*?)\] ::=", re.MULTILINE)
_HARMLESS = re.compile(r'(?:, )?(?:capture="[^"\\]*"|temperature=[\d.e+-]+)')
_ESCAPES = {"\\0": 0, "\\a": 7, "\\b": 8, "\\t": 9, "\\n": 10, "\\v": 11, "\\f": 12, "\\r": 13}
_ESCAPES |= {"\\e": 27, "\\'": 39, '\\"': 34, "\\\\": 92, "\\?": 63, "\\-": 45, "\\]": 93}


class NoAutomaton(Exception):
    """This grammar has no tables; the message says why, and its requests take stock steps."""


@dataclass(frozen=True)
class Rules:
    """The automata of all rules in one table of states; an edge is (low, high, target).

    ``low`` >= 0: a byte from low to high. EPSILON. CALL: ``high`` is the rule that must match.
    REPEAT: ``high`` is a row of ``repeats`` (rule, minimum, maximum).
    """

    first_edges: Ints  # [num_states + 1]
    edges: Ints  # [num_edges, 3]
    starts: Ints  # [num_rules]
    accepting: npt.NDArray[np.bool_]  # [num_states]
    repeats: Ints  # [num_repeats, 3]
    root: int


def read_rules(compiled: xgrammar.CompiledGrammar) -> Rules:
    """The rules of a compiled grammar. Raises NoAutomaton for what the tables cannot hold."""
    import xgrammar
    from xgrammar.testing import _print_grammar_fsms

    version = xgrammar.get_serialization_version()
    if version != FORMAT:
        raise NoAutomaton(f"xgrammar's format is {version}, known is {FORMAT}")
    grammar = compiled.grammar
    for rule, attributes in _ATTRIBUTES.findall(str(grammar)):
        if _HARMLESS.sub("", attributes):
            raise NoAutomaton(f"rule {rule} has [{attributes}]")
    return parse(_print_grammar_fsms(grammar))


def parse(listing: str) -> Rules:
    """The rules out of xgrammar's listing of them."""
    starts: list[int] = []
    names: list[str] = []
    states: dict[int, tuple[str, bool]] = {}
    position = 0
    while header := _RULE.match(listing, position):
        if int(header[1]) != len(starts):
            raise NoAutomaton(f"xgrammar's listing has rule {header[1]} at place {len(starts)}")
        starts.append(int(header[4]))
        names.append(header[2])
        ends = set(map(int, header[5].split(", "))) if header[5] else set()
        position = header.end()
        while row := _STATE.match(listing, position):
            state = int(row[1])
            entry = (row[2], state in ends)
            if states.setdefault(state, entry) != entry:
                raise NoAutomaton(f"rules share the state {state}, but only one may end there")
            position = row.end()
        if not listing.startswith("])\n", position):
            break
        position += len("])\n")
    if listing[position:].strip() or names.count(ROOT) != 1:
        at = listing[position : position + 40]
        raise NoAutomaton(f"xgrammar's listing of its automata cannot be read at {at!r}")
    return _table(states, starts, names.index(ROOT))


def _table(states: dict[int, tuple[str, bool]], starts: list[int], root: int) -> Rules:
    size = max(states) + 1
    first_edges = np.zeros(size + 1, np.int32)
    accepting = np.zeros(size, np.bool_)
    edges: list[tuple[int, int, int]] = []
    repeats: list[tuple[int, int, int]] = []
    for state in range(size):
        row, accepting[state] = states.get(state, ("", False))
        end = 0
        for edge in _EDGE.finditer(row):
            if edge.start() != end:
                break
            end = edge.end()
            edges.append(_edge(edge, repeats))
        if end != len(row):
            raise NoAutomaton(f"xgrammar's listing of its automata cannot be read at {row!r}")
        first_edges[state + 1] = len(edges)
    table = np.array(edges, np.int32).reshape(-1, 3)
    calls = table[table[:, 0] == CALL, 1]
    if (calls >= len(starts)).any() or (table[:, 2] >= size).any():
        raise NoAutomaton("xgrammar's listing names a rule or a state that is not in it")
    repeated = np.array(repeats, np.int32).reshape(-1, 3)
    return Rules(first_edges, table, np.array(starts, np.int32), accepting, repeated, root)


def _edge(edge: re.Match[str], repeats: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    single, low, high, epsilon, rule, repeated, least, most, other, target = edge.groups()
    if single is not None:
        return _byte(single), _byte(single), int(target)
    if low is not None:
        return _byte(low), _byte(high), int(target)
    if epsilon is not None:
        return EPSILON, 0, int(target)
    if rule is not None:
        return CALL, int(rule), int(target)
    if repeated is not None:
        if int(most) < int(least):
            raise NoAutomaton(f"a repetition from {least} to {most} is not known")
        repeats.append((int(repeated), int(least), int(most)))
        return REPEAT, len(repeats) - 1, int(target)
    raise NoAutomaton(f"an edge of the kind {other!r} is not known")


def _byte(character: str) -> int:
    if len(character) == 1:
        value = ord(character)
    elif character.startswith("\\x"):
        value = int(character[2:], 16)
    elif character in _ESCAPES:
        value = _ESCAPES[character]
    else:
        raise NoAutomaton(f"the character {character!r} is not known")
    if value > 0xFF:
        raise NoAutomaton(f"the character {character!r} is not a byte")
    return value
