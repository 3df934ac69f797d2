"""Cost of one decode step in each form of the loop, beside its own work: without vLLM.

A model of two small matrices stands in for a real one. It needs CUDA, and prints a JSON object:
``python -m fusedstep.bench.kernels.loop_cost``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fusedstep.bench.kernels.step_state import build_state
from fusedstep.bench.spread import Spread
from fusedstep.loop_forms import LoopForm
from fusedstep.ops import dispatch
from fusedstep.ops.types import StepInputs
from fusedstep.window.arrivals import ArrivalCounter
from fusedstep.window.graphs import VARIANTS, Recorder, WindowGraphs
from fusedstep.window.loop import run_window
from fusedstep.window.pace import AheadPace, Pace
from fusedstep.window.recorder import CudaRecorder, missing
from fusedstep.window.state import WindowState

NUM_STEPS = 32  # K
WINDOWS = 8  # timed together
REPEATS = 10
HIDDEN, VOCAB = 64, 4096
ONE_ROW = np.zeros(1, dtype=np.int64)
FULL_BUDGET = np.full(1, NUM_STEPS, dtype=np.int32)


class SmallModel:
    """An embedding and an lm_head: about the least that a decode step can be."""

    def __init__(self, inputs: StepInputs, device: torch.device) -> None:
        self.inputs = inputs
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=generator).to(device)
        self.lm_head = torch.randn(HIDDEN, VOCAB, generator=generator).to(device)

    def begin(self, num_reqs: int) -> None:
        self.num_reqs = num_reqs

    def plan(self) -> None:
        pass

    def forward(self) -> torch.Tensor:
        return self.embedding[self.inputs.input_ids[: self.num_reqs]] @ self.lm_head

    def end(self) -> None:
        pass

    @contextmanager
    def capturing(self, num_reqs: int, num_loras: int) -> Iterator[None]:
        self.num_reqs = num_reqs
        yield

    def begin_captured(self, num_reqs: int) -> None:
        self.num_reqs = num_reqs


def measure() -> dict[str, Any]:
    """Microseconds per step (``Spread``) by form, batch 1; a form that fails says why instead."""
    if not torch.cuda.is_available():
        return dict.fromkeys((form.value for form in LoopForm), "needs CUDA")
    result: dict[str, Any] = {}
    for form in LoopForm:
        try:
            result[form.value] = vars(_measure(form))
        except Exception as error:
            result[form.value] = f"{type(error).__name__}: {error}".splitlines()[0]
    return result


def _measure(form: LoopForm) -> Spread:
    if reason := missing(form):
        raise RuntimeError(reason)
    device = torch.device("cuda")
    arrivals = ArrivalCounter(f"loop-cost-{time.time_ns()}")
    arrivals.unlink()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the default one is not recorded
    with torch.cuda.stream(stream):
        return time_form(form, device, CudaRecorder(device, arrivals), AheadPace())


def time_form(form: LoopForm, device: torch.device, recorder: Recorder, pace: Pace) -> Spread:
    """Microseconds per step of windows of NUM_STEPS steps, WINDOWS of them in a row.

    Each window starts at the same length again: the request never ends.
    """
    state = build_state({"temperature": 0.0}, 1, VOCAB, NUM_STEPS, device)
    ops = dispatch.load("triton")(state)
    model = SmallModel(state.inputs, device)
    windows = WindowState.allocate(1, NUM_STEPS, device)
    graphs = None
    if form.is_recorded:
        graphs = WindowGraphs(form, model, ops, windows)
        graphs.record(recorder, 1)
    lengths = state.requests.num_computed_tokens, state.requests.total_len
    moving = [(tensor, tensor.clone()) for tensor in lengths]

    def window() -> int:
        for tensor, first in moving:
            tensor.copy_(first)
        slot = windows.next_slot()
        slot.stage(ONE_ROW, FULL_BUDGET, -1, VARIANTS[0])
        run_window(model, ops, slot, lambda: False, pace, graphs)
        return slot.steps_run

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    assert {window() for _ in range(2)} == {NUM_STEPS}
    times = []
    for _ in range(REPEATS):
        settle()
        began = time.perf_counter()
        for _ in range(WINDOWS):
            window()
        settle()
        times.append(1e6 * (time.perf_counter() - began) / (WINDOWS * NUM_STEPS))
    return Spread.of(times)


if __name__ == "__main__":
    json.dump(measure(), sys.stdout)
