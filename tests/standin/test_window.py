"""Windows on the stand-in GPU: the real recorder, pace and output, kernels interpreted.

Not vLLM, but a small torch model; what is tested is that no data moves too early or too late.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from standin.device import GPU, NUM_STREAMS
from standin.graphs import GENERATOR
from window.engine import MAX_TOKENS, PROMPTS, ROWS, Engine, emitted

from fusedstep.loop_forms import LoopForm
from fusedstep.ops.dispatch import load
from fusedstep.window.arrivals import ArrivalCounter
from fusedstep.window.graphs import GRAMMAR, VARIANTS, WindowGraphs
from fusedstep.window.pace import AheadPace
from fusedstep.window.proof import Proof
from fusedstep.window.recorder import CudaRecorder
from fusedstep.window.state import Fetched, WindowState

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="there is no Triton for this platform"
)


def made() -> Engine:
    with torch.device("cuda"):
        return Engine(load("triton"), PROMPTS, MAX_TOKENS, torch.device("cuda"))


def recorded(
    form: str, engine: Engine, arrivals: ArrivalCounter, sizes: tuple[int, ...]
) -> WindowGraphs:
    recorder = CudaRecorder(torch.device("cuda"), arrivals)
    variants = (*VARIANTS, GRAMMAR) if engine.has_grammars else VARIANTS
    graphs = WindowGraphs(LoopForm(form), engine.model, engine.ops, engine.windows, variants)
    with torch.device("cuda"):
        for num_rows in sizes:
            graphs.record(recorder, num_rows)
    return graphs


@pytest.mark.parametrize(
    ("gpu", "form", "grammars"),
    [
        (None, "while", False),
        (None, None, False),
        (1, "replay", False),
        (2, "unrolled", False),
        (3, "while", True),
    ],
    indirect=["gpu"],
    ids=["while-late", "eager-late", "replay-random", "unrolled-random", "grammars-random"],
)
def test_tokens(gpu: None, arrivals: ArrivalCounter, form: str | None, grammars: bool) -> None:
    """Batches of changing rows and budgets; every buffer is used again and again."""
    engine = made()
    if grammars:
        with torch.device("cuda"):
            engine.constrain()
    engine.reads_late = True
    graphs = form and recorded(form, engine, arrivals, (ROWS, 2))
    pace = AheadPace()
    batches = [[3], [0, 4], [1, 2, 0], [4, 3, 2, 1], [0, 1, 2, 3, 4]]
    for turn in range(45):
        rows = batches[turn % len(batches)]
        budget = [1 + (turn + row) % 4 for row in rows]
        num_rows = None if form is None else 2 if len(rows) <= 2 else ROWS
        logprobs = turn % 9 == 8
        with torch.device("cuda"):
            engine.window(
                budget, pace=pace, graphs=graphs, rows=rows, num_rows=num_rows, logprobs=logprobs
            )
    engine.read()
    assert engine.outputs == emitted(grammars)
    assert GPU.waits["spinning"] == 0 < GPU.waits["blocking"]


def test_more_recordings_than_streams(gpu: None, arrivals: ArrivalCounter) -> None:
    """A WHILE node's body is recorded beside the stream that records the node."""
    engine = made()
    sizes = tuple(1 + n % ROWS for n in range(NUM_STREAMS))
    recorded("while", engine, arrivals, sizes)
    assert not GPU.unfinished


def test_recordings_use_the_same_memory_again(gpu: None, arrivals: ArrivalCounter) -> None:
    """What the allocator keeps for one stream is of no use to another: one stream for all."""
    engine = made()
    recorder = CudaRecorder(torch.device("cuda"), arrivals)
    graphs = WindowGraphs(LoopForm.WHILE, engine.model, engine.ops, engine.windows)
    with torch.device("cuda"):
        for num_rows in (5, 4, 3, 2):
            graphs.record(recorder, num_rows)
    owners = {owner for owner in GPU.reserved if isinstance(owner, tuple) and GPU.reserved[owner]}
    assert len({stream for _, stream in owners}) == 1


def test_the_proof_passes(gpu: None, arrivals: ArrivalCounter) -> None:
    engine = made()
    engine.has_grammars = True  # the proof makes up its own
    graphs = recorded("while", engine, arrivals, (ROWS,))
    with torch.device("cuda"):
        stream = torch.cuda.Stream()
        proof = Proof(engine.state, graphs, 70, lambda *_: (ROWS, 0), stream, AheadPace())
        proof.check(ROWS)


def test_a_recording_that_fails_is_over(gpu: None, arrivals: ArrivalCounter) -> None:
    """Its error is told; what is recorded next is as if nothing had been."""
    ended: list[Any] = []
    torch._C._cuda_endAllocateToPool = lambda _, pool: ended.append(pool)
    torch._C._cuda_releasePool = lambda *_: None
    recorder = CudaRecorder(torch.device("cuda"), arrivals)
    one = torch.ones(1, device="cuda")
    try:
        with pytest.raises(RuntimeError, match="CUDA error"):
            recorder.record(lambda: one.item())
    finally:
        del torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool
    assert len(ended) == 1 and not GENERATOR.recorded
    graph = recorder.record(lambda: one.add_(1))
    graph.replay()
    assert one.item() == 2


def test_host_buffers_and_events(gpu: None) -> None:
    """Pinned on the host under any default device; who waits sleeps."""
    with torch.device("cuda"):
        state = WindowState.allocate(3, 4, torch.device("cuda"))
        pace = AheadPace()
    for slot in state.slots:
        host = [*slot.output.copies._host.values(), slot.staging.steps_allowed, slot.staging.seen]
        assert all(tensor.is_pinned() and not tensor.is_cuda for tensor in host)
        assert slot.output.copies._ready is not None and slot.output.copies._ready.blocking
    assert pace._counts.is_pinned() and all(event.blocking for event in pace._events)


def test_a_result_without_a_stream_is_refused(gpu: None) -> None:
    """It would never come: the host would read what was there before."""
    with torch.device("cuda"):
        slot = WindowState.allocate(3, 4, torch.device("cuda")).next_slot()
        slot.stage(np.arange(3), np.full(3, 4, dtype=np.int32), -1, VARIANTS[0])
        with pytest.raises(AssertionError, match="comes on a stream"):
            Fetched(slot)
