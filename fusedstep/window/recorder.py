"""CUDA graphs: torch's for a step, and one with a conditional WHILE node for a whole window.

The WHILE node is put together with the driver's API (``cuda-bindings``); see the CUDA programming
guide, "Conditional graph nodes".
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from fusedstep.kernels.condition import PTX
from fusedstep.loop_forms import LoopForm
from fusedstep.window.arrivals import ArrivalCounter

MIN_DRIVER = 12040  # the first with WHILE nodes

# The kernel of the condition by CUDA context: graphs run it as long as they live.
_kernels: dict[int, Any] = {}
# The device's addresses of counters. One is registered once, and until it is gone.
_device_addresses: weakref.WeakKeyDictionary[ArrivalCounter, int] = weakref.WeakKeyDictionary()


def driver_version() -> int | None:
    """The newest CUDA version that the driver runs (12040 is 12.4); None without a driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value


def missing(form: LoopForm) -> str | None:
    """The reason that this torch, driver and environment, which have CUDA graphs, lack a form."""
    return no_while_reason() if form is LoopForm.WHILE else None


def no_while_reason() -> str | None:
    """The reason that this torch, driver and environment have no WHILE nodes, or None."""
    version = driver_version()
    if torch.version.cuda is None or version is None:
        return "needs CUDA"
    if version < MIN_DRIVER:
        return "needs a driver for CUDA 12.4 or newer"
    try:
        found = importlib.util.find_spec("cuda.bindings.driver")
    except ModuleNotFoundError:
        found = None
    return "needs the package cuda-bindings" if found is None else None


class CudaRecorder:
    """Records into torch's CUDA graphs that share one memory pool.

    What a graph allocates while it is recorded stays its own. Graphs that share a pool may use the
    same memory: they must never run at the same time.
    """

    def __init__(self, device: torch.device, arrivals: ArrivalCounter) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device(device.type, index)  # torch's memory pools ask for the index
        self._arrivals = arrivals
        self._pool = torch.cuda.MemPool()
        self._body_stream: torch.cuda.Stream | None = None
        self._driver: Driver | None = None

    def record(self, body: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """One call of ``body`` as a graph."""
        graph = torch.cuda.CUDAGraph()
        with self._recording(graph, self._pool.id, torch.cuda.current_stream()):
            body()
        return graph

    @contextmanager
    def _recording(
        self, graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream
    ) -> Iterator[None]:
        """``torch.cuda.graph``; one that fails leaves nothing behind, and its first error is told.

        Where the driver refuses to end it, torch's allocator and its generator of random numbers
        are not told that it is over: one would give no memory back, the other no numbers. Its
        allocator of pinned memory cannot be told, so that the pool is of no use any more.
        """
        first: BaseException | None = None
        try:
            with torch.cuda.graph(graph, pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    yield
                except BaseException as error:
                    first = error
                    raise
        except BaseException as error:
            with suppress(RuntimeError):  # it had been told
                torch._C._cuda_endAllocateToPool(self._device.index, pool)
                torch._C._cuda_releasePool(self._device.index, pool)
            generator = torch.cuda.default_generators[self._device.index]
            generator.graphsafe_set_state(generator.clone_state())  # a clone is in no recording
            self._pool = torch.cuda.MemPool()
            if first is not None and first is not error:
                raise first from None  # the other says only that something went wrong before
            raise

    def record_loop(
        self, body: Callable[[], object], num_active: torch.Tensor, seen: torch.Tensor
    ) -> torch.cuda.CUDAGraph:
        """One graph: a WHILE node whose body is one call of ``body`` and the question after it."""
        if self._driver is None:
            self._driver = Driver(self._arrivals)
        driver = self._driver
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        body_stream = self._stream_beside(stream)
        with (
            # Not the body's pool: its own recording may take no memory.
            self._recording(graph, torch.cuda.graph_pool_handle(), stream),
            driver.while_node(stream.cuda_stream, body_stream.cuda_stream) as handle,
            torch.cuda.stream(body_stream),
            # What the body allocates: torch does not know that its stream is recorded, too.
            torch.cuda.use_mem_pool(self._pool, self._device),
        ):
            body()
            driver.set_condition(body_stream.cuda_stream, handle, num_active, seen)
        return graph

    def _stream_beside(self, stream: torch.cuda.Stream) -> torch.cuda.Stream:
        """The one stream on which this recorder records the bodies of WHILE nodes.

        torch hands out 32 streams in turn, so that a new one for each recording would soon be
        ``stream`` itself; and its allocator gives memory back to the same stream only.
        """
        if self._body_stream is None or self._body_stream == stream:
            self._body_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if self._body_stream == stream:
            self._body_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        assert self._body_stream != stream
        return self._body_stream


class Driver:
    """The few calls of the CUDA driver that torch has no name for."""

    def __init__(self, arrivals: ArrivalCounter) -> None:
        from cuda.bindings import driver

        self._cuda = driver
        # cuda-bindings 13 takes edge data wherever it takes dependencies.
        self._edges = [None] if driver.CUDA_VERSION >= 13000 else []
        self._context = self._call(driver.cuCtxGetCurrent)
        self._kernel = self._load_kernel()
        self._arrivals = self._map_to_device(arrivals)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            error, *results = function(*args)
        except (KeyError, ValueError) as unknown:  # an error of a driver newer than the package
            raise RuntimeError(f"{function.__name__}: {unknown}") from None
        if error != self._cuda.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{function.__name__}: {error.name}")
        return results[0] if len(results) == 1 else results

    def _give_back(self, function: Callable[..., Any], *args: Any) -> None:
        """A call after another has failed, or after the last one: its error is no news."""
        with suppress(RuntimeError):
            self._call(function, *args)

    def _load_kernel(self) -> Any:
        """The kernel that sets the condition, in this context."""
        cuda, context = self._cuda, int(self._context)
        if context not in _kernels:
            module = self._call(cuda.cuModuleLoadData, PTX.encode() + b"\0")
            try:
                _kernels[context] = self._call(cuda.cuModuleGetFunction, module, b"set_condition")
            except RuntimeError:
                self._give_back(cuda.cuModuleUnload, module)
                raise
        return _kernels[context]

    def _map_to_device(self, arrivals: ArrivalCounter) -> int:
        """The device's address of the counter, which lies at the start of a page.

        The page stays registered as long as the counter lives: a page that is unmapped before would
        leave the device, and whoever is given that address next, with the old one.
        """
        known = _device_addresses.get(arrivals)
        if known is not None:
            return known
        cuda, address = self._cuda, arrivals.address
        flags = cuda.CU_MEMHOSTREGISTER_PORTABLE | cuda.CU_MEMHOSTREGISTER_DEVICEMAP
        self._call(cuda.cuMemHostRegister, address, 8, flags)
        # Before the counter's memory goes; what is registered at the program's end goes with it.
        unregister = weakref.finalize(arrivals, self._give_back, cuda.cuMemHostUnregister, address)
        unregister.atexit = False
        try:
            mapped = int(self._call(cuda.cuMemHostGetDevicePointer, address, 0))
        except RuntimeError:
            unregister()
            raise
        _device_addresses[arrivals] = mapped
        return mapped

    @contextmanager
    def while_node(self, stream: int, body_stream: int) -> Iterator[int]:
        """Add a WHILE node to what ``stream`` records; ``body_stream`` records its body.

        Yields the handle of its condition, which is true again at every launch.
        """
        cuda, context = self._cuda, self._context
        status, _, graph, dependencies, *_ = self._call(cuda.cuStreamGetCaptureInfo, stream)
        if status != cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE:
            raise RuntimeError(f"cuStreamGetCaptureInfo: {status.name}, the stream does not record")
        handle = self._call(
            cuda.cuGraphConditionalHandleCreate,
            graph,
            context,
            1,
            cuda.CU_GRAPH_COND_ASSIGN_DEFAULT,
        )
        params = cuda.CUgraphNodeParams()
        params.type = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle = handle
        params.conditional.type = cuda.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        params.conditional.size = 1
        params.conditional.ctx = context
        node = self._call(
            cuda.cuGraphAddNode, graph, dependencies, *self._edges, len(dependencies), params
        )
        body = params.conditional.phGraph_out[0]
        replace = cuda.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES
        self._call(
            cuda.cuStreamUpdateCaptureDependencies, stream, [node], *self._edges, 1, int(replace)
        )
        mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call(cuda.cuStreamBeginCaptureToGraph, body_stream, body, None, None, 0, mode)
        try:
            yield int(handle)
        except BaseException:
            self._give_back(cuda.cuStreamEndCapture, body_stream)
            raise
        self._call(cuda.cuStreamEndCapture, body_stream)

    def set_condition(
        self, stream: int, handle: int, num_active: torch.Tensor, seen: torch.Tensor
    ) -> None:
        """Ask, on the device, whether the WHILE node runs its body once more."""
        values = [handle, num_active.data_ptr(), self._arrivals, seen.data_ptr()]
        arguments = np.array(values, dtype=np.uint64)
        pointers = arguments.ctypes.data + 8 * np.arange(4, dtype=np.uint64)
        grid_and_block = (1,) * 6
        self._call(
            self._cuda.cuLaunchKernel,
            self._kernel,
            *grid_and_block,
            0,
            stream,
            pointers.ctypes.data,
            0,
        )
