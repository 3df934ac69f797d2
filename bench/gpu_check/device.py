"""Checks that only a GPU can answer, without vLLM's engine: a WHILE node around real kernels.

Each check is a process of its own, which may hang: ``python -m fusedstep.bench.gpu_check.device
NAME`` ends with code 0, or with one line that says why not.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusedstep.bench.kernels.loop_cost import HIDDEN, VOCAB, SmallModel
from fusedstep.bench.kernels.step_state import build_state
from fusedstep.loop_forms import BEST, LoopForm
from fusedstep.ops import dispatch
from fusedstep.ops.types import StepInputs
from fusedstep.window.arrivals import NEVER_END, ArrivalCounter
from fusedstep.window.graphs import VARIANTS, RecordableModel, Recorder, WindowGraphs
from fusedstep.window.loop import run_window
from fusedstep.window.pace import AheadPace, Pace
from fusedstep.window.recorder import CudaRecorder, missing
from fusedstep.window.state import Fetched, WindowState

ROWS, STEPS = 2, 24
MAX_LEN, BLOCK_SIZE = 2048, 16
Make = Callable[[StepInputs, torch.device], RecordableModel]


class FlashModel(SmallModel):
    """The small model with vLLM's FlashAttention over a KV cache that stays as it is."""

    def __init__(self, inputs: StepInputs, device: torch.device, num_splits: int) -> None:
        super().__init__(inputs, device)
        self.num_splits = num_splits
        self.version = 3 if torch.cuda.get_device_capability()[0] == 9 else 2
        if self.version == 2 and num_splits > 1:
            raise RuntimeError("FlashAttention 2 does not split")
        width = MAX_LEN // BLOCK_SIZE
        generator = torch.Generator().manual_seed(2)
        shape = 2, ROWS * width, BLOCK_SIZE, 1, HIDDEN
        self.cache = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        blocks = torch.arange(ROWS * width, dtype=torch.int32)
        self.blocks = blocks.view(ROWS, width).to(device)
        self.starts = torch.arange(ROWS + 1, dtype=torch.int32).to(device)

    def forward(self) -> torch.Tensor:
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

        n, (keys, values) = self.num_reqs, self.cache
        hidden = self.embedding[self.inputs.input_ids[:n]]
        query = hidden.view(n, 1, HIDDEN).to(torch.bfloat16)
        attended = torch.empty_like(query)
        lengths = {"max_seqlen_q": 1, "max_seqlen_k": MAX_LEN, "causal": True}
        flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=attended,
            cu_seqlens_q=self.starts[: n + 1],
            seqused_k=self.inputs.seq_lens[:n],
            softmax_scale=HIDDEN**-0.5,
            block_table=self.blocks[:n],
            scheduler_metadata=None,
            fa_version=self.version,
            num_splits=self.num_splits,
            **lengths,
        )
        return (hidden + attended.view(n, HIDDEN).float()) @ self.lm_head


@dataclass(frozen=True)
class Check:
    """A model whose tokens in a WHILE node must be those of the eager loop."""

    what: str
    make: Make


CHECKS = {
    "condition": Check("PTX of the condition, a WHILE node, its end by an arrival", SmallModel),
    "attention": Check(
        "FlashAttention in a WHILE node", lambda inputs, device: FlashModel(inputs, device, 1)
    ),
    "split": Check(
        "split FlashAttention in a WHILE node: programmatic edges",
        lambda inputs, device: FlashModel(inputs, device, 4),
    ),
}


def tokens(
    make: Make,
    form: LoopForm,
    device: torch.device,
    arrivals: ArrivalCounter,
    recorder: Recorder,
    pace: Pace,
) -> list[list[list[int]]]:
    """Of three windows: a whole one, one that an arrival ends, and a whole one."""
    state = build_state({"temperature": 0.0}, ROWS, VOCAB, 3 * STEPS, device)
    model = make(state.inputs, device)
    ops = dispatch.load("triton")(state)
    windows = WindowState.allocate(ROWS, STEPS, device)
    graphs = None
    if form.is_recorded:
        graphs = WindowGraphs(form, model, ops, windows)
        graphs.record(recorder, ROWS)
    stream = torch.cuda.Stream() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    found = []
    for seen in (NEVER_END, arrivals.count - 1, NEVER_END):
        slot = windows.next_slot()
        allowed = np.full(ROWS, STEPS, dtype=np.int32)
        slot.stage(np.arange(ROWS), allowed, -1, VARIANTS[0], arrivals_seen=seen)
        run_window(model, ops, slot, lambda: False, pace, graphs)
        found.append(Fetched(slot, stream).tokens().token_ids)
    return found


def compare(
    make: Make, device: torch.device, arrivals: ArrivalCounter, recorder: Recorder, pace: Pace
) -> None:
    """Raises RuntimeError unless the WHILE form gives the eager loop's tokens."""
    arrivals.add()
    eager, ours = (
        tokens(make, form, device, arrivals, recorder, pace) for form in (LoopForm.EAGER, BEST)
    )
    ended = [len(rows[0]) for rows in ours]
    if ended != [STEPS, 1, STEPS]:
        raise RuntimeError(f"the windows took {ended} steps, not {[STEPS, 1, STEPS]}")
    if ours[0] != eager[0]:
        raise RuntimeError("its tokens are not those of the eager loop")
    # Only the device looks for arrivals here: the eager loop takes all steps of each window.
    for row in range(ROWS):
        mine, theirs = (
            [token for window in windows for token in window[row]] for windows in (ours, eager)
        )
        n = min(len(mine), len(theirs))
        if mine[:n] != theirs[:n]:
            raise RuntimeError("after an arrival its tokens are not those of the eager loop")


def run(name: str) -> None:
    """One check, on the GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("needs CUDA")
    if reason := missing(BEST):
        raise RuntimeError(reason)
    device = torch.device("cuda")
    arrivals = ArrivalCounter(f"gpu-check-{os.getpid()}-{time.time_ns()}")
    arrivals.unlink()
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # not the default one
    with torch.cuda.stream(stream), torch.inference_mode():
        recorder = CudaRecorder(device, arrivals)
        compare(CHECKS[name].make, device, arrivals, recorder, AheadPace())


if __name__ == "__main__":
    try:
        run(sys.argv[1])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}".splitlines()[0])
