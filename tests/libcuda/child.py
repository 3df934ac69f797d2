"""A process whose libcuda is the stub and whose cuda-bindings are those of a folder.

The test calls these functions in it. Recordings of whole windows run on the stand-in GPU of
``tests/standin``: its streams and memory, but the real ``Driver``, which calls the stub.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from libcuda.stub import Stub, goes_on

STUB: Stub
STREAM, BODY_STREAM = 0x5150, 0x5151


def begin(library: Path, bindings: Path) -> None:
    global STUB
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    sys.path.insert(0, str(bindings))
    STUB = Stub(library)


def version() -> int:
    from cuda.bindings import driver

    return int(driver.CUDA_VERSION)


def counter(name: str) -> Any:
    from fusedstep.window.arrivals import ArrivalCounter

    made = ArrivalCounter(f"stub-{os.getpid()}-{name}")
    made.unlink()
    return made


def one_node() -> dict[str, Any]:
    """A WHILE node after a kernel; what was called, and with which arguments."""
    from fusedstep.window.recorder import Driver

    STUB.reset()
    arrivals = counter("node")
    num_active, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    driver = Driver(arrivals)
    STUB.begin(STREAM)
    STUB.launch(STREAM)
    with driver.while_node(STREAM, BODY_STREAM) as handle:
        driver.set_condition(BODY_STREAM, handle, num_active, seen)
    given = handle, num_active.data_ptr(), arrivals.address, seen.data_ptr()
    return {
        "ended": STUB.end(STREAM),
        "calls": STUB.calls,
        "given": given,
        "arguments": STUB.arguments(),
        "left": STUB.left,
    }


def pages() -> list[int]:
    """Registered pages: after two drivers of a counter, when it is gone, and with a second one."""
    from fusedstep.window.recorder import Driver

    STUB.reset()
    gc.collect()
    first = counter("first")
    for _ in range(2):  # vLLM's profile pass, and the real one
        Driver(first)
    counts = [STUB.left["pages"]]
    del first
    gc.collect()
    counts.append(STUB.left["pages"])
    second = counter("second")
    Driver(second)
    counts.append(STUB.left["pages"])
    del second
    gc.collect()
    return [*counts, STUB.left["pages"]]


def refused(stream: int, body_stream: int, recorded: tuple[int, ...]) -> str:
    """What is said about a WHILE node of ``stream`` while these streams are recorded."""
    from fusedstep.window.recorder import Driver

    STUB.reset()
    arrivals = counter("refused")
    driver = Driver(arrivals)
    for handle in recorded:
        STUB.begin(handle)
    try:
        with driver.while_node(stream, body_stream):
            return "nothing"
    except RuntimeError as error:
        return str(error)


def first_error(code: int) -> dict[str, Any]:
    """A body that fails, and then its recording cannot be ended, either."""
    from fusedstep.window.recorder import Driver

    STUB.reset()
    arrivals = counter("error")
    driver = Driver(arrivals)
    STUB.begin(STREAM)
    STUB.fail("cuStreamEndCapture", code)
    try:
        with driver.while_node(STREAM, BODY_STREAM):
            raise RuntimeError("the body's own")
    except RuntimeError as error:
        return {"error": str(error), "ended": STUB.end(STREAM), "left": STUB.left["captures"]}


@contextmanager
def on_the_stand_in() -> Iterator[None]:
    """The stand-in GPU, whose WHILE nodes are those that the stub was asked for."""
    import pytest
    from standin import graphs
    from standin.device import GPU
    from standin.modes import on_device, plain

    from fusedstep.window import recorder

    class Recording(graphs.graph):
        """torch records with the driver."""

        def __enter__(self) -> None:
            super().__enter__()
            STUB.begin(self.stream.cuda_stream)

        def __exit__(self, *error: object) -> None:
            if STUB.end(self.stream.cuda_stream):
                self.graph.invalid = True
            super().__exit__(*error)

    class Driver(recorder.Driver):
        """The real one, and what its calls would do to the device."""

        @contextmanager
        def while_node(self, stream: int, body_stream: int) -> Iterator[int]:
            owner, line = GPU.stream(stream).line.capture, GPU.stream(body_stream).line
            with super().while_node(stream, body_stream) as handle:
                line.capture = self.body = graphs.Body(owner)
                owner.entries.append(self.body.run)
                try:
                    yield handle
                finally:
                    line.capture = None

        def set_condition(self, *args: Any) -> None:
            super().set_condition(*args)
            arguments = STUB.arguments()

            def again() -> bool:
                with plain():
                    return goes_on(arguments)

            self.body.condition = again

    def end_allocation(_: int, pool: Any) -> None:
        GPU.unfinished = [graph for graph in GPU.unfinished if graph.memory is not pool]

    STUB.reset()
    GPU.__init__()
    with pytest.MonkeyPatch.context() as put:
        graphs.install(put.setattr)
        put.setattr(torch._C, "_cuda_endAllocateToPool", end_allocation, raising=False)
        put.setattr(torch._C, "_cuda_releasePool", lambda *_: None, raising=False)
        put.setattr(torch.cuda, "graph", Recording)
        put.setattr(recorder, "Driver", Driver)
        with torch.inference_mode(), on_device(), graphs.Stream():
            yield


def tokens() -> dict[str, Any]:
    """Windows in the WHILE form, to the end of all requests; one is ended by an arrival."""
    from window.engine import MAX_TOKENS, PROMPTS, ROWS, Engine, emitted

    from fusedstep.loop_forms import LoopForm
    from fusedstep.ops.dispatch import load
    from fusedstep.window.graphs import WindowGraphs
    from fusedstep.window.pace import AheadPace
    from fusedstep.window.recorder import CudaRecorder

    cuda = torch.device("cuda")
    arrivals = counter("tokens")
    with on_the_stand_in(), torch.device("cuda"):
        engine = Engine(load("triton"), PROMPTS, MAX_TOKENS, cuda)
        graphs = WindowGraphs(LoopForm.WHILE, engine.model, engine.ops, engine.windows)
        graphs.record(CudaRecorder(cuda, arrivals), ROWS)
        arrivals.add()
        steps = []
        for seen in (0, *[1] * 4):
            ran = engine.window(
                [16] * ROWS,
                pace=AheadPace(),
                graphs=graphs,
                num_rows=ROWS,
                logprobs=False,
                arrivals_seen=seen,
            )
            steps.append(ran)
        return {"same": engine.outputs == emitted(), "steps": steps, "calls": STUB.calls}


def form_after(call: str | None, code: int, after: int) -> dict[str, Any]:
    """What an engine records when a call fails, and what is left behind."""
    from test_forms import runner
    from window.engine import MAX_TOKENS, PROMPTS, Engine

    from fusedstep.loop_forms import LoopForm
    from fusedstep.ops.dispatch import load
    from fusedstep.vllm_plugin.runner import recording
    from fusedstep.window import recorder
    from fusedstep.window.pace import AheadPace

    cuda = torch.device("cuda")
    arrivals = counter("forms")
    recorder._kernels.clear()
    modules = STUB.left["modules"]
    with on_the_stand_in(), torch.device("cuda"):
        from standin.device import GPU

        engine = Engine(load("triton"), PROMPTS, MAX_TOKENS, cuda)
        pace = AheadPace()
        unused: Any = None
        model: Any = engine.model
        model.adapters = SimpleNamespace(graph_cases=[0], made_up=nullcontext)
        parts = recording.LoopParts(
            model, engine.ops, engine.windows, engine.state, arrivals, pace, unused
        )
        us = runner()
        us.max_num_reqs = 1  # one batch size: a recording of each variant
        form = recording.Form(LoopForm.WHILE, "works here")
        store = recording.StepStore(us, parts, form)
        if call is not None:
            STUB.fail(call, code, after)

        @contextmanager
        def graph_capture(device: torch.device) -> Iterator[None]:
            with torch.cuda.Stream():
                yield

        group = SimpleNamespace(world_size=1)
        with (
            patch.object(recording, "graph_capture", graph_capture),
            patch.object(recording, "is_global_first_rank", lambda: False),
            patch.object(recording, "get_tp_group", lambda: group),
        ):
            store.record(profile_only=False, prove=False)
        found = {
            "form": store.form.name.value,
            "reason": store.form.reason,
            "recorded": store.graphs is not None,
            "unfinished": len(GPU.unfinished),
            "streams": sum(line.capture is not None for line in (GPU.default, *GPU.pool)),
            "calls": STUB.calls,
            **STUB.left,
        }
        del store, parts, engine, model
    del arrivals
    gc.collect()
    return found | {"pages": STUB.left["pages"], "modules": STUB.left["modules"] - modules}
