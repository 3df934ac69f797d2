"""Faults put into the kernels, by a change of a copy of their source."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from fusedstep.ops import attention, triton_step

KERNELS = Path(__file__).parents[2] / "triton_kernels"
BARRIER = re.compile(r"^ *tl\.debug_barrier\(\)(?P<why>.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """``old``, which is in the file once, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    case: str = ""  # that shows it, see cases.py
    named: tuple[str, ...] = ()  # each is in the text of a statement that must be named

    def __str__(self) -> str:
        return self.name

    def change(self, source: str) -> str:
        if source.count(self.old) != 1:
            found = source.count(self.old)
            raise ValueError(f"{self.name}: {self.file} has {self.old!r} {found} times, not once")
        return source.replace(self.old, self.new)


def _arrival(name: str, old: str, new: str, *named: str) -> list[Mutant]:
    """Of ``arrive``: a step and attention show it."""
    shown = ("step-plain", "attention-q1")
    return [Mutant(f"{name}-{case}", "winner.py", old, new, case, named) for case in shown]


ATOMIC = "arrived = tl.atomic_add("
MUTANTS: list[Mutant] = [
    *_arrival("relaxed", 'sem="acq_rel"', 'sem="relaxed"', ATOMIC),
    *_arrival("no-release", 'sem="acq_rel"', 'sem="acquire"', ATOMIC),
    *_arrival("no-acquire", 'sem="acq_rel"', 'sem="release"', ATOMIC),
    *_arrival("block-scope", 'sem="acq_rel"', 'sem="acq_rel", scope="cta"', ATOMIC),
    *_arrival(
        "early-reset",
        "if is_last:",
        "if arrived == 0:",
        ATOMIC,
        "tl.store(scratch.arrivals + batch_idx, 0)",
    ),
    *_arrival(
        "last-but-one",
        "arrived == num_programs - 1",
        "arrived >= num_programs - 2",
        "tl.load(",
    ),
    Mutant(
        "relaxed-step-truncation",
        "winner.py",
        'sem="acq_rel"',
        'sem="relaxed"',
        "step-truncation",
        (ATOMIC, "tl.store(scratch.candidates + offset"),
    ),
    Mutant(
        "plain-num-active",
        "rows.py",
        'tl.atomic_add(rows.num_active, -weight, sem="relaxed")',
        "tl.store(rows.num_active, tl.load(rows.num_active) - weight)",
        "step-plain",
        ("rows.num_active",),
    ),
    Mutant(
        "plain-num-active-outside",
        "grammar.py",
        'tl.atomic_add(rows.num_active, -1, sem="relaxed")',
        "tl.store(rows.num_active, tl.load(rows.num_active) - 1)",
        "step-grammar-2",
        ("rows.num_active",),
    ),
    Mutant(
        "every-block-clears-the-token",
        "grammar.py",
        "if split == 0:",
        "if split >= 0:",
        "step-grammar-2",
        ("tl.store(rows.sampled + batch_idx, -1)",),
    ),
    Mutant(
        "counts-written-rows",
        "rows.py",
        "steps_allowed = tl.load(rows.steps_allowed + batch_idx, mask=in_batch, other=0)",
        "steps_allowed = tl.load(rows.num_sampled + batch_idx, mask=in_batch, other=0)",
        "step-plain",
        ("rows.num_sampled",),
    ),
    Mutant(
        "everyone-advances",
        "sample.py",
        "if not arrive(batch_idx, NUM_SPLITS, scratch):\n        return",
        "arrive(batch_idx, NUM_SPLITS, scratch)",
        "step-plain",
        ("tl.store(rows.sampled + batch_idx",),
    ),
    Mutant(
        "one-split-entry",
        "sample.py",
        "offset = batch_idx * NUM_SPLITS + split",
        "offset = batch_idx * NUM_SPLITS",
        "step-plain",
        ("tl.store(scratch.best_scores + offset, score)",),
    ),
    Mutant(
        "list-not-reserved",
        "truncate.py",
        'tl.atomic_add(scratch.num_candidates + batch_idx, count, sem="relaxed")',
        "tl.load(scratch.num_candidates + batch_idx)",
        "step-truncation",
        ("tl.store(scratch.candidates + offset",),
    ),
    Mutant(
        "list-length-before-arrival",
        "truncate.py",
        "    if not arrive(batch_idx, num_parts, scratch):\n        return\n    if top_k",
        "    early = tl.load(scratch.num_candidates + batch_idx)\n"
        "    if not arrive(batch_idx, num_parts, scratch):\n        return\n    if top_k",
        "step-truncation",
        ("early = tl.load(scratch.num_candidates", "listed = tl.atomic_add("),
    ),
    Mutant(
        "one-piece-entry",
        "attention.py",
        "offset = (2 * program +",
        "offset = (program +",
        "attention-q1",
        ("tl.store(scratch.piece_max + offset",),
    ),
]


@dataclass(frozen=True)
class BarrierMutant(Mutant):
    """Without the barrier on one line of the file."""

    line: int = 0

    def change(self, source: str) -> str:
        lines = source.split("\n")
        lines[self.line - 1] = lines[self.line - 1].replace("tl.debug_barrier()", "pass")
        return "\n".join(lines)


def barrier_mutants() -> list[BarrierMutant]:
    """Every barrier of the kernels taken out, one at a time, but those for the compiler only."""
    mutants = []
    for path in sorted(KERNELS.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for match in BARRIER.finditer(source):
            if match["why"].strip().startswith("# compiler:"):
                continue  # keeps loads early, orders nothing
            line = source.count("\n", 0, match.start()) + 1
            mutants.append(BarrierMutant(f"{path.name}:{line}", path.name, "", "", line=line))
    return mutants


@contextmanager
def mutated(mutant: Mutant, folder: Path) -> Iterator[None]:
    """Inside, what is launched is a copy of the kernels with the fault; lines are the same."""
    name = f"mutated_{re.sub(r'[^a-z0-9]', '_', mutant.name)}"
    for path in KERNELS.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        if path.name == mutant.file:
            source = mutant.change(source)
        (folder / path.name).write_text(source.replace("fusedstep.kernels", name))
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    known = set(sys.modules)
    sys.modules[name] = package
    try:
        spec.loader.exec_module(package)
        with ExitStack() as stack:
            for module in (triton_step, attention):
                _replace_kernels(module, name, stack)
            yield
    finally:
        for module_name in set(sys.modules) - known:
            if module_name.split(".")[0] == name:
                del sys.modules[module_name]


def _replace_kernels(module: ModuleType, package: str, stack: ExitStack) -> None:
    for name, value in list(vars(module).items()):
        origin = getattr(getattr(value, "fn", None), "__module__", "")
        if origin.startswith("fusedstep.kernels."):
            copy = import_module(origin.replace("fusedstep.kernels", package))
            stack.enter_context(patch.object(module, name, getattr(copy, name)))
