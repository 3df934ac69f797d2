"""Happens-before between the accesses of a launch, by vector clocks: finds races, not symptoms.

A program is modelled as any number of threads, of which nothing is known but:

* A *barrier* of the program orders all that its threads did before it and all that they do after
  it. So its accesses are numbered by *interval*, the time between two barriers. In an interval the
  accesses of different statements are unordered, and so are the elements of one access.
* Exception: two accesses of one statement with the same tensor of addresses, such as the load and
  the store of ``tl.store(p, tl.load(p) + 1)``. An element's accesses are then one thread's. (A
  scalar has no such owner: all threads load it, one stores it.)
* Atomics of a scalar are one thread's, the *leader's*, in the order in which it does them. Its
  *release* covers the intervals that the program has completed, not the one that is running: other
  threads' stores may still be on their way. What its *acquire* learns, the program's other threads
  know after the next barrier. There is one right after an atomic whose value is used, because it
  goes through shared memory.
* Atomics synchronise, and do not race with each other, if their scope includes both programs: gpu
  or sys, not cta. Relaxed atomics carry a release on; a plain store to the address ends it.
* Other than that nothing is ordered: no cache modifier and no volatile load orders anything, and a
  reduction's internal barriers are not counted.

Two accesses of one element race if one of them writes, they are not both atomic, and neither
happens before the other. A launch whose executions have no race reads what it would on
sequentially consistent memory; the end of a launch orders everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from races.interpreter import Access, Site

NEVER = 2**62


@dataclass(frozen=True, eq=False)
class Event:
    """An access, its place in its program, and what happened before it."""

    access: Access
    interval: int
    tick: int  # of an atomic: its number among its leader's; else beyond every clock
    # Of each program the last interval that happened before, then of each leader the last tick.
    clock: np.ndarray  # [2 * num_programs]

    def happens_before(self, later: Event) -> bool:
        intervals, ticks = np.split(later.clock, 2)
        program = self.access.program
        return bool(self.interval <= intervals[program] or self.tick <= ticks[program])


@dataclass(frozen=True)
class Race:
    """Two unordered accesses of an element, in the order in which this execution made them."""

    first: Access
    second: Access
    why: str

    @property
    def sites(self) -> tuple[Site, Site]:
        return self.first.site, self.second.site

    def describe(self, kernel: str, element: str) -> str:
        first, second = self.first, self.second
        return (
            f"{kernel}: {element}: {second.kind} at {second.site} by program {second.program} "
            f"is not ordered after {first.kind} at {first.site} by program {first.program}: "
            f"{self.why}"
        )


class Trace:
    """The accesses of one launch, and what orders them."""

    def __init__(self, num_programs: int, scopes: tuple[str, ...] = ("gpu", "sys")) -> None:
        """``scopes`` are those that include all programs."""
        self.events: list[Event] = []
        self._scopes = scopes
        self._num_programs = num_programs
        self._doubled: list[Access] = []
        self._interval = [1] * num_programs
        # What all threads of a program know, and what its leader knows.
        self._clock = [np.zeros(2 * num_programs, np.int64) for _ in range(num_programs)]
        self._leader = list(self._clock)
        self._released: dict[int, np.ndarray] = {}

    def access(self, access: Access, values: np.ndarray | None) -> None:
        program, tick, clock = access.program, NEVER, self._clock[access.program]
        if access.kind == "atomic" and access.is_scalar:
            clock = self._leader[program]
            tick = clock[self._num_programs + program] + 1
        self.events.append(Event(access, self._interval[program], tick, clock))
        if access.kind == "store":
            self._store(access, values)
        elif access.kind == "atomic":
            known = clock.copy()
            if access.is_scalar:
                known[self._num_programs + program] = tick
            for offset in access.offsets.tolist() if access.scope in self._scopes else ():
                known = self._synchronise(known, offset, access.sem)
            if access.is_scalar:
                self._leader[program] = known

    def _store(self, access: Access, values: np.ndarray | None) -> None:
        assert values is not None
        pairs = np.stack([access.offsets, values.astype(np.int64, casting="unsafe")], axis=1)
        if len(np.unique(pairs, axis=0)) > len(np.unique(access.offsets)):
            self._doubled.append(access)
        if self._released:
            for offset in access.offsets.tolist():
                self._released.pop(offset, None)

    def _synchronise(self, known: np.ndarray, offset: int, sem: str) -> np.ndarray:
        """What an atomic of this address leaves, and what its thread knows after it."""
        released = self._released.get(offset, np.zeros_like(known))
        if sem in ("acquire", "acq_rel"):
            known = np.maximum(known, released)
        if sem in ("release", "acq_rel"):
            self._released[offset] = np.maximum(released, known)
        return known

    def barrier(self, program: int) -> None:
        known = self._leader[program].copy()
        known[program] = self._interval[program]
        self._clock[program] = self._leader[program] = known
        self._interval[program] += 1

    def races(self) -> Iterator[tuple[Race, int]]:
        """Every race once per pair of accesses, with the offset of an element."""
        for access in self._doubled:
            why = "it stores two values to one element"
            yield Race(access, access, why), int(access.offsets[0])
        seen = set()
        for offset, ids in self._conflicts():
            for pair in combinations(ids, 2):
                if pair not in seen:
                    seen.add(pair)
                    first, second = (self.events[i] for i in pair)
                    if self._race(first, second):
                        yield Race(first.access, second.access, self._why(first, second)), offset

    def _conflicts(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Elements that several accesses have in common, one of them a write: once per set."""
        accesses = [event.access for event in self.events]
        if not accesses:
            return
        offsets = np.concatenate([access.offsets for access in accesses])
        lengths = [len(access.offsets) for access in accesses]
        ids = np.repeat(np.arange(len(accesses)), lengths)
        sizes = np.repeat([access.itemsize for access in accesses], lengths)
        writes = np.repeat([access.kind != "load" for access in accesses], lengths)
        order = np.lexsort((ids, offsets))
        offsets, ids, sizes, writes = (array[order] for array in (offsets, ids, sizes, writes))
        overlap = offsets[1:] < offsets[:-1] + sizes[:-1]
        assert not (overlap & (offsets[1:] != offsets[:-1])).any(), "overlapping elements"
        starts = np.flatnonzero(np.r_[True, offsets[1:] != offsets[:-1]])
        stops = np.r_[starts[1:], len(offsets)]
        interesting = np.logical_or.reduceat(writes, starts) & (stops - starts > 1)
        seen = set()
        for start, stop in zip(starts[interesting], stops[interesting], strict=True):
            group = tuple(dict.fromkeys(ids[start:stop].tolist()))
            if group not in seen:
                seen.add(group)
                yield int(offsets[start]), group

    def _why(self, first: Event, second: Event) -> str:
        """What might have ordered two accesses: the mistake is often there."""
        program = first.access.program
        if program == second.access.program:
            return "there is no barrier between them"
        later = [event for event in self.events if event.interval >= first.interval]
        atomics = [
            event
            for event in later
            if event.access.kind == "atomic"
            and event.access.program == program
            and event.access.offsets[0] in self._meets(second.access.program)
        ]
        if not atomics:
            return "no atomic of the first program follows it"
        event = atomics[0]
        text = f"next atomic: {event.access.sem}.{event.access.scope} at {event.access.site}"
        return text + ", without a barrier before it" * (event.interval == first.interval)

    def _meets(self, program: int) -> set[int]:
        accesses = (event.access for event in self.events)
        return {
            int(access.offsets[0])
            for access in accesses
            if access.kind == "atomic" and access.program == program
        }

    def _race(self, first: Event, second: Event) -> bool:
        a, b = first.access, second.access
        if a.kind == b.kind == "load" or first.happens_before(second):
            return False
        atomic = a.kind == b.kind == "atomic"
        if a.program == b.program:
            same = a.site is b.site and np.array_equal(a.offsets, b.offsets) and not a.is_scalar
            return not same and not atomic
        return not (atomic and a.scope in self._scopes and b.scope in self._scopes)
