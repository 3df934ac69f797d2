"""Runs a case while its accesses are watched: what it wrote, and which of them race."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from races.arena import Arena
from races.cases import Case, Tensors, small_blocks
from races.happens_before import Race, Trace
from races.interpreter import Launch, Memory, Schedule, intercepted
from races.schedules import Ids, InOrder, Interleaved, WeakMemory

# Of the arena, the number of programs, their ids, and a source of chance.
Parts = Callable[[Arena, Ids, random.Random], tuple[Schedule, Memory]]


@dataclass(frozen=True)
class Outcome:
    """A run of a case."""

    written: Tensors
    races: dict[str, Race]  # by description, one for each pair of statements
    kernels: set[str]  # that were launched
    sites: set[tuple[str, int]]  # file name and line of every statement that accessed memory


def run_in_order(case: Case, seed: int | None = None) -> Outcome:
    """Whole programs one after the other; a seed shuffles them."""

    def parts(arena: Arena, ids: Ids, rng: random.Random) -> tuple[Schedule, Memory]:
        order = list(range(len(ids)))
        if seed is not None:
            rng.shuffle(order)
        return InOrder(ids, order), Memory(arena, len(ids))

    return _run(case, parts, seed)


def run_interleaved(case: Case, seed: int) -> Outcome:
    """Programs that take turns at every access, on weakly ordered memory."""

    def parts(arena: Arena, ids: Ids, rng: random.Random) -> tuple[Schedule, Memory]:
        return Interleaved(ids, rng), WeakMemory(arena, len(ids), rng)

    return _run(case, parts, seed)


def _run(case: Case, parts: Parts, seed: int | None) -> Outcome:
    rng = random.Random(seed)
    launches: list[tuple[Launch, Trace]] = []

    def start(kernel: str, folder: str, arena: Arena, ids: Ids) -> Launch:
        trace = Trace(len(ids))
        launch = Launch(kernel, folder, arena, *parts(arena, ids, rng), trace)
        launches.append((launch, trace))
        return launch

    with small_blocks(), intercepted(start):
        written = case.run()
    found = {
        race.sites: (race.describe(launch.kernel, launch.arena.name(offset)), race)
        for launch, trace in launches
        for race, offset in trace.races()
    }
    return Outcome(
        written={name: tensor.clone() for name, tensor in written.items()},
        races=dict(found.values()),
        kernels={launch.kernel for launch, _ in launches},
        sites={
            (Path(event.access.site.path).name, event.access.site.line)
            for _, trace in launches
            for event in trace.events
        },
    )


def differences(one: Outcome, other: Outcome) -> list[str]:
    """Names of what the two have not written alike, bit for bit."""
    return [
        name
        for name, tensor in one.written.items()
        if not torch.equal(_bits(tensor), _bits(other.written[name]))
    ]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
