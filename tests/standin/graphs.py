"""CUDA graphs of the stand-in, and torch.cuda's names for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from standin.device import CUDA, GPU, Event, Stream, enqueue, readable, running

from fusedstep.policy import MAX_STEPS
from fusedstep.window.arrivals import ArrivalCounter


class Pool:
    """Memory that recordings keep."""

    def __init__(self) -> None:
        self.recorded = False  # as torch's allocator of pinned memory sees it
        weakref.finalize(self, _forget, id(self))

    @property
    def id(self) -> Pool:
        return self


def _forget(pool: int) -> None:
    for owner in [o for o in GPU.reserved if isinstance(o, tuple) and o[0] == pool]:
        del GPU.reserved[owner]


class Generator:
    """torch's, of random numbers on the device: while a graph is recorded, only that draws."""

    def __init__(self) -> None:
        self.recorded = False

    def clone_state(self) -> Generator:
        return Generator()

    def graphsafe_set_state(self, state: Generator) -> None:
        self.recorded = state.recorded


GENERATOR = Generator()


class CUDAGraph:
    """What a stream has recorded."""

    is_body = False

    def __init__(self, keep_graph: bool = False) -> None:
        self.entries: list[Any] = []
        self.invalid = False
        self.memory: Pool | None = None
        self.replays = 0

    @property
    def pool(self) -> int | None:
        return id(self.memory)

    def capture_begin(self, pool: Pool | None = None, capture_error_mode: str = "global") -> None:
        """What is enqueued on the current stream is recorded from here on."""
        line = GPU.current.line
        GENERATOR.recorded = True
        if line is GPU.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if line.capture is not None:
            raise RuntimeError("cudaStreamBeginCapture: the stream is capturing")
        self.memory = pool or Pool()
        if self.memory.recorded:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.memory.recorded = True
        self.line, line.capture = line, self
        GPU.unfinished.append(self)

    def capture_end(self) -> None:
        """As torch: an invalid recording leaves allocators and the generator as they are."""
        self.line.capture = None
        if self.invalid:
            raise RuntimeError("CUDA error: failed due to a previous error during capture")
        GPU.unfinished.remove(self)
        GENERATOR.recorded = self.memory.recorded = False

    def replay(self) -> None:
        assert GPU.capturing is None, "a graph in a graph"
        self.replays += 1
        enqueue(self.run)

    def run(self) -> None:
        for work in self.entries:
            assert not isinstance(work, tuple), "waits for another stream"
            work()

    def reset(self) -> None:
        self.entries.clear()


class graph:
    """``torch.cuda.graph``."""

    def __init__(
        self,
        cuda_graph: CUDAGraph,
        pool: Pool | None = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        self.graph, self.memory, self.stream = cuda_graph, pool, stream or Stream()

    def __enter__(self) -> None:
        GPU.synchronize()
        GPU.empty_cache()
        self.stream.__enter__()
        self.graph.capture_begin(self.memory)

    def __exit__(self, *_: object) -> None:
        try:
            self.graph.capture_end()
        finally:
            self.stream.__exit__()


@contextmanager
def use_mem_pool(pool: Pool, device: Any = None) -> Iterator[None]:
    if device is not None and torch.device(device).index is None:
        raise ValueError(f"Expected a torch.device with a specified index, but got: {device}")
    before, GPU.memory_pool = GPU.memory_pool, id(pool)
    try:
        yield
    finally:
        GPU.memory_pool = before


class Body:
    """The body of a WHILE node: turns until its condition says no."""

    is_body = True

    def __init__(self, owner: CUDAGraph) -> None:
        self.owner = owner
        self.entries: list[Any] = []
        self.condition: Callable[[], bool] | None = None
        self.turns = 0

    @property
    def invalid(self) -> bool:
        return self.owner.invalid

    @invalid.setter
    def invalid(self, value: bool) -> None:
        self.owner.invalid = value

    def run(self) -> None:
        for _ in range(MAX_STEPS + 1):
            for work in self.entries:
                work()
            self.turns += 1
            if self.condition is None or not self.condition():
                return
        raise AssertionError("no row has a budget beyond the longest window")


class Driver:
    """``fusedstep.window.recorder.Driver`` on the stand-in."""

    made: int = 0

    def __init__(self, arrivals: ArrivalCounter) -> None:
        Driver.made += 1
        self._arrivals = weakref.ref(arrivals)  # registered: the program keeps it mapped

    def close(self) -> None:
        pass

    @contextmanager
    def while_node(self, stream: int, body_stream: int) -> Iterator[Body]:
        owner = GPU.stream(stream).line.capture
        assert owner is not None, "cuGraphAddNode: no graph"
        line = GPU.stream(body_stream).line
        if line.capture is not None or line is GPU.default:
            owner.invalid = True
            raise RuntimeError("cuStreamBeginCaptureToGraph: CUDA_ERROR_ILLEGAL_STATE")
        line.capture = body = Body(owner)
        owner.entries.append(body.run)
        try:
            yield body
        finally:
            line.capture = None

    def set_condition(
        self, stream: int, body: Body, num_active: torch.Tensor, seen: torch.Tensor
    ) -> None:
        assert GPU.stream(stream).line.capture is body

        def again() -> bool:
            arrivals = self._arrivals()
            assert arrivals is not None, "the page of the arrivals is not mapped any more"
            with running():
                return int(num_active) > 0 and not arrivals.exceeds(int(seen))

        body.condition = again


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """torch.cuda is the stand-in from here on, in all of this process; Triton's interpreter, its
    kernels' launches. ``put``: a test's, which takes it back."""
    import triton
    from triton.runtime.interpreter import GridExecutor

    names = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "MemPool": Pool,
        "graph": graph,
        "use_mem_pool": use_mem_pool,
        "stream": lambda stream: stream,
        "set_stream": _set_stream,
        "current_stream": lambda *_: GPU.current,
        "default_stream": lambda *_: GPU.default_stream(),
        "default_generators": (GENERATOR,),
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: GPU.capturing is not None,
        "synchronize": GPU.synchronize,
        "empty_cache": GPU.empty_cache,
        "current_device": lambda: CUDA.index,
        "set_device": lambda *_: None,
        "graph_pool_handle": Pool,
        "get_device_properties": lambda *_: SimpleNamespace(
            name="stand-in",
            major=9,
            minor=0,
            multi_processor_count=4,
            shared_memory_per_block_optin=227 << 10,
            shared_memory_per_multiprocessor=228 << 10,
        ),
    }
    for name, value in names.items():
        put(torch.cuda, name, value)
    put(torch, "Event", Event)
    put(torch.accelerator, "synchronize", GPU.synchronize)
    put(torch.accelerator, "empty_cache", GPU.empty_cache)
    put(torch.accelerator, "get_memory_info", GPU.memory_info)
    interpret = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        readable((*args, *kwargs.values()))
        enqueue(lambda: interpret(self, *args, **kwargs))

    put(GridExecutor, "__call__", launch)
    # Triton would look for the GPU's driver: a kernel that is interpreted has no target.
    put(triton.language.target_info, "current_target", lambda: None)


def _set_stream(stream: Stream) -> None:
    GPU.current = stream
