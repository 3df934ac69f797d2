"""Kernels (numba): the rules of a grammar to a deterministic table of next states.

A *configuration* is (state of a rule, repetitions done, stack of frames to return to). A state of
the table is a set of configurations, closed under all that takes no byte. Stacks, configurations
and sets are numbered, so that equal ones have one number.

The kernels release the GIL. They stand in one file because numba's on-disk cache sees changes of a
kernel's own file only.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from fusedstep.grammar.entries import NOWHERE, OUTSIDE

EPSILON, CALL, REPEAT = -1, -2, -3  # kinds of edges that take no byte: see rules.Rules

# How many different stacks, configurations and sets are kept: first few, for most grammars need no
# more and memory costs time. A grammar that needs more than many is cut there, as at the limit of
# states. Sets are those of the states, and those that a byte leads to before they are closed.
FEW, MANY = 1 << 13, 1 << 17
_MEMBERS = 16  # of all sets, for each of that number
_CLOSURE = 1 << 14  # configurations of one set
_UNFOLDED = 8  # frames that one is unfolded to, at most

# int32 as all that is numbered: numba compiles a kernel once for each type it is called with.
_ZERO = np.int32(0)
_PLAIN = np.int32(-1)  # a frame's count if no repetition waits there
_EMPTY = np.int32(0)  # the number of the empty stack
_REFUSING, _ACCEPTING, _SEEDS = 0, 1, 2  # tags of sets
_CLOSED, _ENDLESS, _FULL = 0, 1, 2  # how a closure ends


class _Rules(NamedTuple):
    """rules.Rules as arrays."""

    first_edges: Any
    edges: Any
    starts: Any
    accepting: Any
    repeats: Any
    only_ends: Any  # states from which a rule can only end: a call that leads there needs no frame
    first_frames: Any  # [num_states + 1], into frames
    frames: Any  # see _unfold


class _Numbers(NamedTuple):
    """Numbered triples: (state to return to, its count, stack below) or configurations."""

    keys: Any
    size: Any
    slots: Any


class _Sets(NamedTuple):
    """Numbered sets; ``values`` is the state of the table that a set is or leads to."""

    firsts: Any
    members: Any
    tags: Any
    values: Any
    size: Any
    slots: Any


class _Closures(NamedTuple):
    """The memory for closures."""

    heights: Any  # of the stacks
    seen: Any  # by configuration: the last closure that it was in
    todo: Any
    found: Any


@njit(cache=True, nogil=True, inline="always")
def _hash(a, b, c):
    h = np.uint64(a + 1) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ np.uint64(b + 2)) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(29)) ^ np.uint64(c + 3)) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(32))


@njit(cache=True, nogil=True)
def _number_of(numbers, a, b, c):
    """The number of the triple (a, b, c), a new one if need be; -1 if there is no more room."""
    keys, size, slots = numbers
    last = np.uint64(len(slots) - 1)
    at = _hash(a, b, c) & last
    while slots[at] >= 0:
        key = keys[slots[at]]
        if key[0] == a and key[1] == b and key[2] == c:
            return slots[at]
        at = (at + np.uint64(1)) & last
    number = np.int32(size[0])
    if number == len(keys):
        return np.int32(-1)
    keys[number, 0] = a
    keys[number, 1] = b
    keys[number, 2] = c
    slots[at] = number
    size[0] = number + 1
    return number


@njit(cache=True, nogil=True)
def _set_number(sets, tag, found):
    """The number of the set ``found`` (sorted) under ``tag``; -1 if there is no more room."""
    firsts, members, tags, _, size, slots = sets
    h = np.uint64(tag + 7)
    for member in found:
        h = _hash(member, np.int64(h & np.uint64(0x7FFFFFFF)), np.int64(h >> np.uint64(33)))
    last = np.uint64(len(slots) - 1)
    at = h & last
    while slots[at] >= 0:
        number = slots[at]
        first = firsts[number]
        if tags[number] == tag and firsts[number + 1] - first == len(found):
            same = True
            for i in range(len(found)):
                if members[first + i] != found[i]:
                    same = False
                    break
            if same:
                return number
        at = (at + np.uint64(1)) & last
    number = size[0]
    first = firsts[number]
    if number == len(tags) or first + len(found) > len(members):
        return -1
    members[first : first + len(found)] = found
    tags[number] = tag
    firsts[number + 1] = first + len(found)
    slots[at] = number
    size[0] = number + 1
    return number


@njit(cache=True, nogil=True)
def _sort_unique(values):
    """Sorts in place, doubles last, and gives how many different values there are."""
    values.sort()
    kept = 0
    for value in values:
        if kept == 0 or values[kept - 1] != value:
            values[kept] = value
            kept += 1
    return kept


@njit(cache=True, nogil=True)
def _add(configurations, closures, stamp, num_todo, state, done, stack):
    """Notes a configuration to visit; gives how many there are now, -1 if there is no room."""
    if stack < 0:
        return -1
    number = _number_of(configurations, state, done, stack)
    if number < 0 or num_todo == len(closures.todo):
        return -1
    if closures.seen[number] != stamp:
        closures.seen[number] = stamp
        closures.todo[num_todo] = number
        num_todo += 1
    return num_todo


@njit(cache=True, nogil=True)
def _push(stacks, heights, state, count, below):
    """The number of a stack with one more frame; -1 if there is no room."""
    number = _number_of(stacks, state, count, below) if below >= 0 else below
    if number >= 0:
        heights[number] = heights[below] + 1
    return number


@njit(cache=True, nogil=True)
def _unfold(first_edges, edges, starts, accepting, only_ends):
    """The frames that stand for a return to each state, the lowest first.

    A state that does nothing but call a rule stands for two frames: what comes after the call, and
    on it the start of that rule. So stacks that mean the same are more often the same.
    """
    size = len(accepting)
    first_frames = np.zeros(size + 1, np.int64)
    frames = np.empty(size * (_UNFOLDED + 1), np.int32)
    for state in range(size):
        first = first_frames[state]
        frames[first] = state
        end = first + 1
        at = first
        steps = 0
        while at < end:
            frame = frames[at]
            edge = first_edges[frame]
            calls = first_edges[frame + 1] == edge + 1 and edges[edge, 0] == CALL
            if not calls or accepting[frame]:
                at += 1
                continue
            steps += 1
            if steps > _UNFOLDED:  # rules that call each other, perhaps
                frames[first] = state
                end = first + 1
                break
            _, rule, target = edges[edge]
            if only_ends[target]:
                frames[at] = starts[rule]
            else:
                for i in range(end, at, -1):
                    frames[i] = frames[i - 1]
                frames[at] = target
                frames[at + 1] = starts[rule]
                end += 1
        first_frames[state + 1] = end
    return first_frames, frames


@njit(cache=True, nogil=True)
def _end_rule(rules, stacks, configurations, closures, stamp, num_todo, stack):
    """Notes where a rule that has matched returns to."""
    back, count, below = stacks.keys[stack]
    if count == _PLAIN:
        return _add(configurations, closures, stamp, num_todo, back, _ZERO, below)
    _, row, target = rules.edges[rules.first_edges[back]]
    count = np.int32(count + 1)
    if count >= rules.repeats[row, 1]:
        num_todo = _add(configurations, closures, stamp, num_todo, target, _ZERO, below)
    if num_todo >= 0 and count < rules.repeats[row, 2]:
        num_todo = _add(configurations, closures, stamp, num_todo, back, count, below)
    return num_todo


@njit(cache=True, nogil=True)
def _close(rules, stacks, configurations, closures, stamp, seeds):
    """Closes a set under all that takes no byte.

    Gives (how it ended, number of configurations found, accepted?, configurations visited); those
    found, sorted, are the ones that can take a byte.
    """
    heights, _, todo, found = closures
    num_todo, num_found, visited = 0, 0, 0
    accept = False
    highest = 0
    for seed in seeds:
        state, done, stack = configurations.keys[seed]
        num_todo = _add(configurations, closures, stamp, num_todo, state, done, stack)
        highest = max(highest, heights[stack])
    # In a higher stack some rule has called itself and no byte was taken.
    highest += len(rules.starts) * (_UNFOLDED + 1)
    while num_todo > 0:
        num_todo -= 1
        visited += 1
        configuration = todo[num_todo]
        state, done, stack = configurations.keys[configuration]
        takes_byte = False
        for e in range(rules.first_edges[state], rules.first_edges[state + 1]):
            kind, row, target = rules.edges[e]
            if kind >= 0:
                takes_byte = True
            elif kind == EPSILON:
                num_todo = _add(configurations, closures, stamp, num_todo, target, _ZERO, stack)
            else:
                rule, inner = row, stack
                if kind == CALL:
                    if not rules.only_ends[target]:
                        for i in range(rules.first_frames[target], rules.first_frames[target + 1]):
                            inner = _push(stacks, heights, rules.frames[i], _PLAIN, inner)
                else:
                    rule, least, most = rules.repeats[row]
                    if done >= least:
                        num_todo = _add(
                            configurations, closures, stamp, num_todo, target, _ZERO, stack
                        )
                    if num_todo < 0:
                        break
                    if done >= most:
                        continue
                    inner = _push(stacks, heights, state, done, stack)
                start = rules.starts[rule]
                num_todo = _add(configurations, closures, stamp, num_todo, start, _ZERO, inner)
                if num_todo >= 0 and heights[inner] > highest:
                    return _ENDLESS, 0, False, visited
            if num_todo < 0:
                break
        if num_todo >= 0 and rules.accepting[state]:
            if stack == _EMPTY:
                accept = True
            else:
                num_todo = _end_rule(
                    rules, stacks, configurations, closures, stamp, num_todo, stack
                )
        if num_todo < 0 or num_found == len(found):
            return _FULL, 0, False, visited
        if takes_byte:
            found[num_found] = configuration
            num_found += 1
    found[:num_found].sort()
    return _CLOSED, num_found, accept, visited


@njit(cache=True, nogil=True)
def _seeds_by(rules, configurations, members, byte, seeds):
    """Finds what this byte leads to, not yet closed; gives how many, -1 if there is no room."""
    count = 0
    for member in members:
        state, _, stack = configurations.keys[member]
        for e in range(rules.first_edges[state], rules.first_edges[state + 1]):
            low, high, target = rules.edges[e]
            if low >= 0 and low <= byte and byte <= high:
                seed = _number_of(configurations, target, _ZERO, stack)
                if seed < 0 or count == len(seeds):
                    return -1
                seeds[count] = seed
                count += 1
    return _sort_unique(seeds[:count])


@njit(cache=True, nogil=True)
def _mark_cuts(rules, configurations, members, cuts):
    """Marks the bytes at which some configuration's edges begin, or are just over."""
    cuts[:] = False
    cuts[0] = True
    for member in members:
        state = configurations.keys[member, 0]
        for e in range(rules.first_edges[state], rules.first_edges[state + 1]):
            low, high, _ = rules.edges[e]
            if low >= 0:
                cuts[low] = True
                cuts[high + 1] = True


@njit(cache=True, nogil=True)
def determinise(first_edges, edges, starts, accepting, repeats, root, max_states, max_work, room):
    """The table of next states, breadth first from the start.

    What is beyond a limit, or would need an endless closure (left recursion), is OUTSIDE.
    Gives the table, who accepts, the state and the byte that each state was first found by, and
    True if there was too little ``room`` (FEW, MANY). The table is empty if not even the start can
    be made.
    """
    only_ends = accepting & (first_edges[1:] == first_edges[:-1])
    frames = _unfold(first_edges, edges, starts, accepting, only_ends)
    rules = _Rules(first_edges, edges, starts, accepting, repeats, only_ends, *frames)
    stacks = _Numbers(
        np.empty((room, 3), np.int32), np.ones(1, np.int64), np.full(2 * room, -1, np.int32)
    )
    configurations = _Numbers(
        np.empty((room, 3), np.int32),
        np.zeros(1, np.int64),
        np.full(2 * room, -1, np.int32),
    )
    sets = _Sets(
        np.zeros(room + 1, np.int64),
        np.empty(room * _MEMBERS, np.int32),
        np.empty(room, np.int8),
        np.full(room, OUTSIDE, np.int32),
        np.zeros(1, np.int64),
        np.full(2 * room, -1, np.int32),
    )
    closures = _Closures(
        np.zeros(room, np.int32),
        np.zeros(room, np.int32),
        np.empty(_CLOSURE, np.int32),
        np.empty(_CLOSURE, np.int32),
    )
    table = np.empty((max_states, 256), np.int32)
    accepts = np.zeros(max_states, np.bool_)
    parents = np.full(max_states, -1, np.int32)
    via = np.zeros(max_states, np.uint8)
    own_sets = np.empty(max_states, np.int64)
    seeds = np.empty(_CLOSURE, np.int32)
    cuts = np.empty(257, np.bool_)
    num_states, work, stamp = 0, 0, 0
    full = False
    parent = -1  # of what is being found; -1: the start is
    while parent < num_states and work <= max_work:
        members = sets.members[0:0]
        if parent >= 0:
            number = own_sets[parent]
            members = sets.members[sets.firsts[number] : sets.firsts[number + 1]]
        _mark_cuts(rules, configurations, members, cuts)
        target = NOWHERE
        for byte in range(256 if parent >= 0 else 1):
            if cuts[byte]:
                count = 1
                if parent >= 0:
                    count = _seeds_by(rules, configurations, members, byte, seeds)
                else:
                    seeds[0] = _number_of(configurations, starts[root], _ZERO, _EMPTY)
                target = NOWHERE
                if count != 0:
                    before = sets.size[0]
                    origin = _set_number(sets, _SEEDS, seeds[:count]) if count > 0 else -1
                    if origin < 0:
                        full = True
                        break
                    if origin == before:
                        stamp += 1
                        ended, num_found, accept, visited = _close(
                            rules, stacks, configurations, closures, stamp, seeds[:count]
                        )
                        work += visited
                        if ended == _FULL:
                            full = True
                            break
                        if ended == _CLOSED:
                            tag = _ACCEPTING if accept else _REFUSING
                            number = _set_number(sets, tag, closures.found[:num_found])
                            if number < 0:
                                full = True
                                break
                            if sets.values[number] == OUTSIDE and num_states < max_states:
                                sets.values[number] = num_states
                                own_sets[num_states] = number
                                accepts[num_states] = accept
                                parents[num_states] = parent
                                via[num_states] = byte
                                num_states += 1
                            sets.values[origin] = sets.values[number]
                    target = sets.values[origin]
            if parent >= 0:
                table[parent, byte] = target
        if full:
            break
        parent += 1
    num_states = max(parent, 0)  # those found after them have no row
    for state in range(num_states):
        for byte in range(256):
            if table[state, byte] >= num_states:
                table[state, byte] = OUTSIDE
    return (
        table[:num_states].copy(),
        accepts[:num_states].copy(),
        parents[:num_states].copy(),
        via[:num_states].copy(),
        full,
    )
