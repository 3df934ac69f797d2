"""Runs launches in Triton's interpreter, with a memory and an order of programs of our own.

Triton's interpreter runs the programs of a launch one after the other, straight on the tensors.
Inside ``intercepted`` each load, store, atomic and barrier goes through a ``Launch`` instead: a
schedule says which program goes on, a memory what it reads, and a trace keeps what was done.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
from races.arena import Arena
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

BUILDER = triton_interpreter.interpreter_builder
ADD = triton_interpreter._ir.ATOMIC_OP.ADD
FADD = triton_interpreter._ir.ATOMIC_OP.FADD


@dataclass(frozen=True)
class Site:
    """A statement of a kernel."""

    path: str
    line: int
    text: str
    uses_value: bool  # False: an expression whose value nobody takes

    def __str__(self) -> str:
        return f"{Path(self.path).name}:{self.line} `{self.text}`"


@cache
def _statements(path: str) -> dict[int, Site]:
    """The innermost statement on each line of a file; of an ``if`` or a loop, its head."""
    source = Path(path).read_text(encoding="utf-8")
    sites = {}
    for node in ast.walk(ast.parse(source)):  # outer statements come before inner ones
        if isinstance(node, ast.stmt) and node.end_lineno is not None:
            text = ast.unparse(node).split("\n")[0]
            site = Site(path, node.lineno, text, not isinstance(node, ast.Expr))
            sites |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), site)
    return sites


@dataclass(frozen=True, eq=False)
class Access:
    """One load, store or atomic of a program: all elements that its mask selects."""

    program: int
    kind: str  # load, store, atomic
    offsets: np.ndarray  # [n] int64, in the arena
    itemsize: int
    is_scalar: bool  # no tensor of addresses: every thread has the one that there is
    site: Site
    sem: str = ""  # of an atomic: relaxed, acquire, release, acq_rel
    scope: str = ""  # of an atomic: cta, gpu, sys

    @property
    def index(self) -> np.ndarray:
        return self.offsets // self.itemsize


class Schedule(Protocol):
    """Who runs: ``now`` is the running program, which calls ``pause`` before each access."""

    now: int

    def run(self, programs: list[Callable[[], None]]) -> None: ...

    def pause(self) -> None: ...


class Memory:
    """Each access takes effect at once."""

    def __init__(self, arena: Arena, num_programs: int) -> None:
        self.arena = arena

    def load(self, access: Access) -> np.ndarray:
        return self.arena.cells(access.itemsize)[access.index]

    def store(self, access: Access, values: np.ndarray) -> None:
        self.arena.cells(access.itemsize)[access.index] = values

    def add(self, access: Access, values: np.ndarray) -> np.ndarray:
        """Atomic: the elements in any order; returns what each has found."""
        cells, found = self.arena.bytes.view(values.dtype), np.empty_like(values)
        for i, index in enumerate(access.index):
            found[i] = cells[index]
            cells[index] += values[i]
        return found

    def barrier(self, program: int) -> None: ...

    def finish(self) -> None:
        """The launch has ended: everything is in the arena."""


class Recorder(Protocol):
    """Is told of everything that a launch does, in the order in which it does it."""

    def access(self, access: Access, values: np.ndarray | None) -> None: ...

    def barrier(self, program: int) -> None: ...


@dataclass
class Launch:
    """One launch that is running."""

    kernel: str
    folder: str  # of the kernels' sources
    arena: Arena
    schedule: Schedule
    memory: Memory
    recorder: Recorder

    def access(
        self,
        kind: str,
        ptrs: TensorHandle,
        chosen: np.ndarray,
        itemsize: int,
        sem: Any = "",
        scope: Any = "",
    ) -> Access:
        self.schedule.pause()
        return Access(
            self.schedule.now,
            kind,
            self.arena.offsets(np.asarray(ptrs.data)[chosen], itemsize),
            itemsize,
            chosen.size == 1,
            self._site(),
            _name(sem),
            _name(scope),
        )

    def barrier(self) -> None:
        self.recorder.barrier(self.schedule.now)
        self.memory.barrier(self.schedule.now)

    def _site(self) -> Site:
        frame = inspect.currentframe()
        while frame is not None and str(Path(frame.f_code.co_filename).parent) != self.folder:
            frame = frame.f_back
        assert frame is not None, "an access outside of the kernels' sources"
        return _statements(frame.f_code.co_filename)[frame.f_lineno]


def _name(member: Any) -> str:
    """MEM_SEMANTIC.ACQUIRE_RELEASE -> acq_rel, MEM_SYNC_SCOPE.GPU -> gpu."""
    name = str(member).rsplit(".", 1)[-1].lower()
    return {"acquire_release": "acq_rel", "system": "sys"}.get(name, name)


def _chosen(ptrs: TensorHandle, mask: TensorHandle) -> np.ndarray:
    """The mask in the shape of the addresses."""
    return np.broadcast_to(mask.data, np.shape(ptrs.data)).astype(bool)


def _values(handle: TensorHandle, chosen: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(handle.data, chosen.shape)[chosen])


@contextmanager
def _patched_language() -> Iterator[None]:
    """Inside, Triton's language is patched once per module of kernels, not in every call."""
    stock, scopes = triton_interpreter._patch_lang, {}

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in scopes:
            scopes[module] = stock(function)
        return scopes[module]

    with patch.object(triton_interpreter, "_patch_lang", patch_once):
        try:
            yield
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()


StartLaunch = Callable[[str, str, Arena, list[tuple[int, int, int]]], Launch]


@contextmanager
def intercepted(start: StartLaunch) -> Iterator[None]:
    """Inside, ``start(kernel, folder, arena, ids of the programs)`` makes what a launch runs on."""
    launch: Launch | None = None

    def running() -> Launch:
        assert launch is not None
        return launch

    def load(_: Any, ptrs: Any, mask: Any, other: Any, *__: Any) -> TensorHandle:
        element = ptrs.get_element_ty()
        dtype = triton_interpreter._get_np_dtype(element)
        chosen = _chosen(ptrs, mask)
        fill = 0 if other is None else other.data
        values = np.array(np.broadcast_to(fill, chosen.shape), dtype)
        if chosen.any():
            access = running().access("load", ptrs, chosen, dtype.itemsize)
            running().recorder.access(access, None)
            values[chosen] = running().memory.load(access).view(dtype)
        return TensorHandle(values, element)

    def store(_: Any, ptrs: Any, value: Any, mask: Any, *__: Any) -> None:
        chosen = _chosen(ptrs, mask)
        if chosen.any():
            values = _values(value, chosen)
            access = running().access("store", ptrs, chosen, values.itemsize)
            bits = values.view(f"u{values.itemsize}")
            running().recorder.access(access, bits)
            running().memory.store(access, bits)

    def atomic(
        _: Any, operation: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any
    ) -> TensorHandle:
        if operation not in (ADD, FADD):
            raise NotImplementedError(f"{operation}: only atomic adds are modelled")
        chosen = _chosen(ptr, mask)
        found = np.zeros(chosen.shape, val.data.dtype)
        if chosen.any():
            values = _values(val, chosen)
            access = running().access("atomic", ptr, chosen, values.itemsize, sem, scope)
            running().recorder.access(access, None)
            found[chosen] = running().memory.add(access, values)
            if access.site.uses_value:  # it reaches all threads through shared memory
                running().barrier()
        return TensorHandle(found, val.dtype.scalar)

    def not_modelled(*_: Any) -> None:
        raise NotImplementedError("only loads, stores and atomic adds are modelled")

    def barrier(_: Any) -> None:
        running().barrier()

    def call(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        nonlocal launch
        named = {name: kwargs[name] for name in executor.arg_names if name in kwargs}
        arguments = inspect.getcallargs(executor.fn, *args, **named)
        arena = Arena(arguments)
        grid = (*executor.grid, 1, 1)[:3]
        ids = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        folder = str(Path(executor.fn.__code__.co_filename).parent)
        launch = start(executor.fn.__name__, folder, arena, ids)
        with _patched_language():
            values = {
                name: value
                if name in executor.constexprs
                else triton_interpreter._implicit_cvt(value)
                for name, value in arguments.items()
            }
            triton_interpreter._patch_lang(executor.fn)
            BUILDER.set_grid_dim(*grid)
            launch.schedule.run([lambda: executor.fn(**values)] * len(ids))
            launch.memory.finish()
        launch = None
        arena.copy_back()

    replaced = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic,
        "create_atomic_cas": not_modelled,
        "create_barrier": barrier,
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(patch.object(InterpreterBuilder, name, function))
        stack.enter_context(patch.object(GridExecutor, "__call__", call))
        yield
