"""CUDA graphs without CUDA: torch operations and kernel launches on a tape, at fixed addresses.

What is recorded is not run: nothing that the body writes to memory of others changes. A replay
knows tensors only; whatever Python decided while the tape ran stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedstep.ops.launch import Launch
from fusedstep.policy import MAX_STEPS
from fusedstep.window.arrivals import ArrivalCounter

# Questions to the device: a stream that is being recorded cannot answer.
SYNCHRONISING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class SyncTrap(TorchDispatchMode):
    """No operation here may wait for the device or take memory."""

    def __init__(self, allocations: bool = True) -> None:
        super().__init__()
        self.allocations = allocations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in SYNCHRONISING, f"{name} waits for the device"
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        makes = [r for r in returns if r.alias_info is None and "Tensor" in str(r.type)]
        assert self.allocations or not makes, f"{name} takes memory"
        return result


class Tape(TorchDispatchMode):
    """A recorded body; ``replay`` runs it once more."""

    def __init__(self, recorder: TapeRecorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.entries: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        assert schema.name not in SYNCHRONISING, f"{schema.name} while recording"
        if func.namespace == "aten" and func._can_decompose():
            # Inference mode leaves that to us: some are views at times only.
            with self:
                return func.decompose(*args, **kwargs)
        call = lambda: func(*args, **kwargs)  # noqa: E731
        if schema.name in self.recorder.python_ops:
            with self:  # what it does is on the tape, not that it was called
                return self.recorder.python_ops[schema.name](*args, **kwargs)
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return call()  # a view: an address, no work
        written = [
            kwargs.get(a.name, args[i] if i < len(args) else None)
            for i, a in enumerate(schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        if written and any(r.alias_info is None for r in schema.returns):
            # One tensor of its own beside what it writes: tried on copies for its shape.
            copies = [a.clone() if any(a is w for w in written) else a for a in args]
            own = func(*copies, **kwargs)
            self.entries.append(lambda: own.copy_(call()))
            return own
        if written:
            self.entries.append(call)
            return written[0] if schema.returns else None
        result = call()
        assert isinstance(result, torch.Tensor), f"{schema.name} gives more than a tensor"
        result.zero_()
        self.entries.append(lambda: result.copy_(call()))
        return result

    def replay(self) -> None:
        self.recorder.replays += 1
        for entry in self.entries:
            entry()


class TapeRecorder:
    """``fusedstep.window.graphs.Recorder`` on tapes."""

    def __init__(self, arrivals: ArrivalCounter | None = None) -> None:
        self.arrivals = arrivals
        self.recorded = self.loops = self.replays = 0
        self.python_ops: dict[str, Callable[..., Any]] = {}  # operations that are written in Python

    def record(self, body: Callable[[], object]) -> Tape:
        self.recorded += 1
        tape = Tape(self)
        with launches_on(tape), tape:
            body()
        return tape

    def record_loop(
        self, body: Callable[[], object], num_active: torch.Tensor, seen: torch.Tensor
    ) -> Loop:
        self.loops += 1
        return Loop(self.record(body), num_active, seen, self.arrivals)


class Loop:
    """A WHILE node: asks after each turn, on "the device"."""

    def __init__(
        self,
        body: Tape,
        num_active: torch.Tensor,
        seen: torch.Tensor,
        arrivals: ArrivalCounter | None,
    ) -> None:
        self.body, self.num_active, self.seen, self.arrivals = body, num_active, seen, arrivals
        self.turns = 0

    def replay(self) -> None:
        for _ in range(MAX_STEPS):
            self.body.replay()
            self.turns += 1
            arrived = self.arrivals.count if self.arrivals else 0
            if int(self.num_active) <= 0 or arrived > int(self.seen):
                return
        raise AssertionError("no row may take more steps than the longest window has")


@contextmanager
def launches_on(tape: Tape) -> Any:
    """Triton kernels go on the tape instead of being launched."""
    launch = Launch.__call__
    with patch.object(Launch, "__call__", lambda self: tape.entries.append(lambda: launch(self))):
        yield
