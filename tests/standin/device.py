"""A GPU that is not there: memory of its own, streams that run late, on the CPU's tensors.

Under ``on_device()`` a tensor that is made with ``device="cuda"`` is a CPU tensor that says it is
on cuda:0, and work on it is queued on the current stream. It runs as late as the program allows:
when something waits for it. With a seed it also runs at random times before. So

* what reads device memory, or pinned memory under copy, without a wait gets what was there before;
* what overwrites pinned memory before the copy has run changes what is copied;
* host memory in a device operation is refused, but for copies, scalars and indices;
* memory that was not written yet holds NaN.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

CUDA = torch.device("cuda", 0)
NUM_STREAMS = 32  # torch hands out so many, round robin
TOTAL_BYTES = 1 << 34
Work = Callable[[], object]


class Block:
    """A piece of device memory; hangs on its storage and ends with it."""

    def __init__(self, num_bytes: int, owner: Any) -> None:
        self.num_bytes, self.owner = num_bytes, owner
        GPU.live[owner] += num_bytes
        GPU.reserved[owner] = max(GPU.reserved[owner], GPU.live[owner])

    def __del__(self) -> None:
        GPU.live[self.owner] -= self.num_bytes


class Stream:
    """Work in order. ``capture``: what records it instead (``standin.graphs``)."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        made = GPU.pool[GPU.num_made % NUM_STREAMS]
        GPU.num_made += 1
        self.line = made

    @property
    def cuda_stream(self) -> int:
        return self.line.handle

    @property
    def device(self) -> torch.device:
        return CUDA

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.line is self.line

    def __hash__(self) -> int:
        return hash(self.line.handle)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        if event.line is not None:
            assert self.line.capture is None or event.line is self.line, "joins a recording"
            self.line.put((event.line, event.until))

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        GPU.may_wait("a stream")
        self.line.run()

    def query(self) -> bool:
        self.line.run()  # a host that asks in a loop must get on
        return True

    def __enter__(self) -> Stream:
        """May be entered again within itself."""
        GPU.entered.append(GPU.current)
        GPU.current = self
        return self

    def __exit__(self, *_: object) -> None:
        GPU.current = GPU.entered.pop()


class Line:
    """The queue of a stream."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.queue: deque[Any] = deque()
        self.given = self.done = 0
        self.capture: Any = None

    def put(self, work: Any) -> None:
        if self.capture is not None:
            self.capture.entries.append(work)
            return
        with GPU.lock:
            self.queue.append(work)
            self.given += 1
        GPU.maybe_run()

    def run(self, until: int | None = None) -> None:
        """Do the work up to the ``until``-th piece, and before it what it waits for."""
        with GPU.lock:
            until = self.given if until is None else until
            while self.done < until:
                work = self.queue.popleft()
                self.done += 1
                if isinstance(work, tuple):
                    line, other = work
                    line.run(other)
                else:
                    with running():
                        work()


class Event:
    """A place in a stream."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self.blocking = blocking
        self.line: Line | None = None
        self.until = 0

    def record(self, stream: Stream | None = None) -> None:
        self.line = (stream or GPU.current).line
        self.until = self.line.given

    def wait(self, stream: Stream | None = None) -> None:
        (stream or GPU.current).wait_event(self)

    def synchronize(self) -> None:
        GPU.may_wait("an event")
        if self.line is not None:
            GPU.waits["blocking" if self.blocking else "spinning"] += 1
            self.line.run(self.until)

    def query(self) -> bool:
        if self.line is not None:
            self.line.run(self.until)
        return True

    def elapsed_time(self, _: Event) -> float:
        return 1.0


class Device:
    """The one GPU of this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.pool = [Line(1000 + n) for n in range(NUM_STREAMS)]
        self.default = Line(0)
        self.num_made = 0
        self.local = threading.local()
        self.random: random.Random | None = None
        self.live: Counter[Any] = Counter()  # bytes by owner: a stream, or a pool and a stream
        self.reserved: Counter[Any] = Counter()
        self.waits: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()  # what the program has waited for
        self.shapes: dict[Any, list[tuple[Any, ...]]] = {}
        self.memory_pool: Any = None  # of ``use_mem_pool``
        self.unfinished: list[Any] = []  # recordings whose end torch has not seen

    @property
    def current(self) -> Stream:
        stream = getattr(self.local, "stream", None)
        return stream if stream is not None else self.default_stream()

    @current.setter
    def current(self, stream: Stream) -> None:
        self.local.stream = stream

    @property
    def entered(self) -> list[Stream]:
        """Of this thread: the streams to go back to."""
        return self.local.__dict__.setdefault("entered", [])

    def default_stream(self) -> Stream:
        stream = Stream.__new__(Stream)
        stream.line = self.default
        return stream

    def stream(self, handle: int) -> Stream:
        """The one with this handle."""
        stream = self.default_stream()
        stream.line = next(line for line in (self.default, *self.pool) if line.handle == handle)
        return stream

    @property
    def capturing(self) -> Any:
        return self.current.line.capture

    def may_wait(self, what: str) -> None:
        self.asked[what] += 1
        if self.capturing is not None:
            self.capturing.invalid = True
            raise RuntimeError(f"CUDA error: not permitted when a stream is capturing: {what}")

    def synchronize(self, *_: object) -> None:
        self.may_wait("the device")
        self.finish()

    def finish(self) -> None:
        """Do all work that waits."""
        for line in (self.default, *self.pool):
            line.run()

    def maybe_run(self) -> None:
        """In the second mode, work is done at random times."""
        if self.random is not None and self.random.random() < 0.3:
            waiting = [line for line in (self.default, *self.pool) if line.queue]
            if waiting:
                line = self.random.choice(waiting)
                line.run(self.random.randint(line.done, line.given))

    def owner(self) -> Any:
        """Whose memory is allocated now: blocks are used again by the same stream only."""
        capture, line = self.capturing, self.current.line
        if capture is None:
            return line.handle
        pool = self.memory_pool if capture.is_body else capture.pool
        if pool is None:
            capture.invalid = True
            raise RuntimeError("CUDA error: cudaMalloc while a stream is capturing")
        return pool, line.handle

    def live_bytes(self) -> int:
        return sum(self.live.values())

    def free_bytes(self) -> int:
        return TOTAL_BYTES - sum(self.reserved.values())

    def empty_cache(self) -> None:
        for owner in self.reserved:
            if not isinstance(owner, tuple):  # a pool keeps its own
                self.reserved[owner] = self.live[owner]

    def memory_info(self, *_: object) -> tuple[int, int]:
        return self.free_bytes(), TOTAL_BYTES

    def adopt(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``'s memory is the device's from here on."""
        storage = tensor.untyped_storage()
        if getattr(storage, "block", None) is None:
            storage.block = Block(storage.nbytes(), self.owner())
        return tensor

    def view_of_pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The device's view of pinned host memory, which it reads when the work runs."""
        with plain():
            view = torch.from_numpy(tensor.numpy())
        view.untyped_storage().block = Block(0, "host")
        return view


GPU = Device()


def on_gpu(tensor: Any) -> bool:
    return getattr(_storage(tensor), "block", None) is not None


def pinned(tensor: Any) -> bool:
    return getattr(_storage(tensor), "pinned", False)


def _storage(tensor: torch.Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def readable(values: Any) -> None:
    """What a kernel takes: the device's memory, or what it sees of the host's."""
    for n, value in enumerate(values):
        if isinstance(value, (tuple, list)):
            readable(value)
        elif isinstance(value, torch.Tensor) and not (on_gpu(value) or pinned(value)):
            raise ValueError(
                f"Pointer argument (at {n}) cannot be accessed from Triton (cpu tensor?): "
                f"{value.dtype} {list(value.shape)}"
            )


@contextmanager
def plain() -> Iterator[None]:
    """Tensors are plain tensors."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


@contextmanager
def running() -> Iterator[None]:
    """The device works."""
    with plain(), torch.inference_mode():
        yield


def enqueue(work: Work) -> None:
    """One launch on the current stream."""
    GPU.current.line.put(work)
