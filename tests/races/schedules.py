"""Who runs, and what a program may read: orders of programs, and weakly ordered memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from races.arena import ALIGNMENT, Arena
from races.interpreter import BUILDER, Access, Memory

Ids = list[tuple[int, int, int]]


class InOrder:
    """Runs whole programs one after the other."""

    def __init__(self, ids: Ids, order: list[int]) -> None:
        self.now = 0
        self._ids, self._order = ids, order

    def run(self, programs: list[Callable[[], None]]) -> None:
        for number in self._order:
            self.now = number
            BUILDER.grid_idx = self._ids[number]
            programs[number]()

    def pause(self) -> None: ...


class Stop(BaseException):
    """Another program has failed. Not an Exception: the interpreter wraps those."""


class Interleaved:
    """Each program is a thread; at each access chance decides which of them goes on."""

    def __init__(self, ids: Ids, rng: random.Random) -> None:
        self.now = 0
        self._ids, self._rng = ids, rng
        self._stays = rng.choice([0.0, 0.5, 0.9, 0.99])
        self._turns = [threading.Semaphore(0) for _ in ids]
        self._end = threading.Semaphore(0)
        self._live = list(range(len(ids)))
        self._error: BaseException | None = None

    def run(self, programs: list[Callable[[], None]]) -> None:
        threads = [
            threading.Thread(target=self._run, args=(number, program))
            for number, program in enumerate(programs)
        ]
        for thread in threads:
            thread.start()
        self._pass_on()
        self._end.acquire()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        if self._rng.random() >= self._stays:
            me = self.now
            self._pass_on()
            self._wait(me)

    def _run(self, number: int, program: Callable[[], None]) -> None:
        try:
            self._wait(number)
            program()
        except Stop:
            pass
        except BaseException as error:
            self._error = error
        self._live.remove(number)
        self._pass_on()

    def _pass_on(self) -> None:
        if not self._live:
            self._end.release()
        else:
            self._turns[self._rng.choice(self._live)].release()

    def _wait(self, number: int) -> None:
        self._turns[number].acquire()
        if self._error is not None:
            raise Stop
        self.now = number
        BUILDER.grid_idx = self._ids[number]


@dataclass(frozen=True)
class Pending:
    """A store on its way to memory."""

    access: Access
    values: np.ndarray
    interval: int


class WeakMemory(Memory):
    """Stores arrive late and in any order, loads may be old: as late and as old as is allowed.

    A program's stores wait in a buffer until chance, a release or the end of the launch lets them
    out; what it loads it takes from cache lines of its own, which chance or an acquire refreshes.
    At first they hold what was in memory when the launch began.
    A release lets out the stores before the program's last barrier, an acquire counts from the
    next barrier on: what one thread does says nothing of the others. A program is sure to see its
    own stores from the barrier after them on. ``.cg`` is ignored: it promises nothing.
    """

    def __init__(self, arena: Arena, num_programs: int, rng: random.Random) -> None:
        super().__init__(arena, num_programs)
        self._rng = rng
        self._pending: list[list[Pending]] = [[] for _ in range(num_programs)]
        self._interval = [0] * num_programs
        self._acquired = [False] * num_programs
        self._arrives = rng.choice([0.0, 0.02, 0.3])  # how likely, at each access of a program
        self._caches = [arena.bytes.copy() for _ in range(num_programs)]
        lines = len(arena.bytes) // ALIGNMENT
        self._valid = [np.ones(lines, dtype=bool) for _ in range(num_programs)]

    def load(self, access: Access) -> np.ndarray:
        self._some_arrive()
        program, lines = access.program, access.offsets // ALIGNMENT
        cache, valid = self._caches[program], self._valid[program]
        missing = np.unique(lines)
        missing = missing[~valid[missing] | (self._random(len(missing)) < 0.1)]
        shape = (-1, ALIGNMENT)
        cache.reshape(shape)[missing] = self.arena.bytes.reshape(shape)[missing]
        valid[missing] = True
        found = cache.view(f"u{access.itemsize}")[access.index]
        for store in self._pending[program]:
            if store.interval < self._interval[program] or self._rng.random() < 0.5:
                at = {offset: i for i, offset in enumerate(store.access.offsets.tolist())}
                for i, offset in enumerate(access.offsets.tolist()):
                    if offset in at:
                        found[i] = store.values[at[offset]]
        return found

    def store(self, access: Access, values: np.ndarray) -> None:
        self._some_arrive()
        early = self._random(len(values)) < 0.5  # a store's elements need not arrive together
        for part in (early, ~early):
            if part.any():
                elements = replace(access, offsets=access.offsets[part])
                pending = Pending(elements, values[part], self._interval[access.program])
                self._pending[access.program].append(pending)

    def add(self, access: Access, values: np.ndarray) -> np.ndarray:
        program, wide = access.program, access.scope != "cta"
        covered = self._interval[program] if wide and access.sem in ("release", "acq_rel") else -1
        self._arrive(program, lambda s: s.interval < covered or _overlap(s.access, access))
        self._acquired[program] |= wide and access.sem in ("acquire", "acq_rel")
        return super().add(access, values)

    def barrier(self, program: int) -> None:
        self._interval[program] += 1
        if self._acquired[program]:
            self._valid[program][:] = False
            self._acquired[program] = False

    def finish(self) -> None:
        for program in range(len(self._pending)):
            self._arrive(program, lambda _: True)

    def _some_arrive(self) -> None:
        program = self._rng.randrange(len(self._pending))
        self._arrive(program, lambda _: self._rng.random() < self._arrives)

    def _arrive(self, program: int, chosen: Callable[[Pending], bool]) -> None:
        """The chosen stores reach memory, but none before an older one of the same element."""
        kept: list[Pending] = []
        for store in self._pending[program]:
            if chosen(store) and not any(_overlap(old.access, store.access) for old in kept):
                super().store(store.access, store.values)
                cache = self._caches[program].view(f"u{store.access.itemsize}")
                cache[store.access.index] = store.values
            else:
                kept.append(store)
        self._pending[program] = kept

    def _random(self, size: int) -> np.ndarray:
        return np.array([self._rng.random() for _ in range(size)])


def _overlap(a: Access, b: Access) -> bool:
    return bool(np.intersect1d(a.offsets, b.offsets).size)
