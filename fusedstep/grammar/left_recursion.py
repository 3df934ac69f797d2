"""Rules that begin by calling themselves (``sum: sum "+" product | product``), without that.

Such a rule matches one of its other beginnings, and then any number of times what follows the call.
So the call at the start goes, and from each state that may end the rule there is a way to what
followed it. Rules that begin by calling each other stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fusedstep.grammar.subsets import CALL, EPSILON

if TYPE_CHECKING:
    from fusedstep.grammar.rules import Rules

Edge = tuple[int, int, int]


def without_left_recursion(rules: Rules) -> Rules:
    """The same rules, none of which begins by calling itself."""
    edges: list[list[Edge]] = [[] for _ in rules.accepting]
    for state, rows in enumerate(np.split(rules.edges, rules.first_edges[1:-1])):
        edges[state] = [(low, high, target) for low, high, target in rows.tolist()]
    accepting = rules.accepting.tolist()
    starts = rules.starts.tolist()
    for rule, start in enumerate(starts):
        beginning = _reached([start], edges, EPSILON)
        firsts = [edge for state in beginning for edge in edges[state] if edge[0] != EPSILON]
        calls = [target for low, high, target in firsts if (low, high) == (CALL, rule)]
        if not calls:
            continue
        own = _reached([start], edges, None)
        starts[rule] = len(edges)
        edges.append([edge for edge in firsts if edge[:2] != (CALL, rule)])
        accepting.append(any(accepting[state] for state in beginning))
        for state in (*own, starts[rule]):
            if accepting[state]:
                edges[state] = edges[state] + [(EPSILON, 0, target) for target in calls]
    if starts == rules.starts.tolist():
        return rules
    lengths = [0, *(len(row) for row in edges)]
    return replace(
        rules,
        first_edges=np.cumsum(lengths).astype(np.int32),
        edges=np.array([edge for row in edges for edge in row], np.int32).reshape(-1, 3),
        starts=np.array(starts, np.int32),
        accepting=np.array(accepting, np.bool_),
    )


def _reached(states: list[int], edges: list[list[Edge]], kind: int | None) -> list[int]:
    """These states and all that they lead to, by edges of a kind or by any."""
    found = list(states)
    for state in found:
        for low, _, target in edges[state]:
            if kind in (None, low) and target not in found:
                found.append(target)
    return found
