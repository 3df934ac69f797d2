"""The libcuda of ``stub.c``: compiled, and in this process instead of the driver's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("stub.c")
DEVICE_OFFSET = 1 << 56  # as in stub.c
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
# Where setup_env.py installs them.
BINDINGS = {major: Path(sys.prefix, f"cuda-bindings-{major}") for major in (12, 13)}


def missing(major: int) -> str | None:
    """The reason that the stub cannot be tried here with these bindings, or None."""
    if not sys.platform.startswith("linux"):
        return "CUDA's loader is another one here"
    if COMPILER is None:
        return "there is no C compiler"
    if not BINDINGS[major].is_dir():
        return f"cuda-bindings {major} is not installed: `make install` does it or says why not"
    return None


def compiled(folder: Path) -> Path:
    """The library. Its name is what the loader goes by: who loads libcuda later gets this one."""
    assert COMPILER is not None
    library = folder / "libcuda.so.1"
    flags = ["-std=gnu11", "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([COMPILER, *flags, "-o", library, SOURCE], check=True)
    return library


class Stub:
    """What the library has been called for."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.stub_calls.restype = ctypes.c_char_p
        self._library.stub_arguments.restype = ctypes.POINTER(ctypes.c_uint64)

    def reset(self) -> None:
        """No streams, no graphs, nothing fails. What was loaded and registered stays."""
        self._library.stub_reset()

    def fail(self, call: str, code: int, after: int = 0) -> None:
        """The call gives an error from now on, after so many that go well."""
        self._library.stub_fail(call.encode(), code, after)

    def begin(self, stream: int) -> None:
        """torch begins to record a stream."""
        self._library.stub_begin(ctypes.c_void_p(stream))

    def launch(self, stream: int) -> None:
        """torch launches a kernel there."""
        self._library.stub_launch(ctypes.c_void_p(stream))

    def end(self, stream: int) -> int:
        """torch ends the recording: an error code."""
        return int(self._library.stub_end(ctypes.c_void_p(stream)))

    @property
    def calls(self) -> list[str]:
        text: bytes = self._library.stub_calls()
        return text.decode().splitlines()

    @property
    def left(self) -> dict[str, int]:
        """What is not given back."""
        names = ("modules", "pages", "captures")
        return {name: int(getattr(self._library, f"stub_{name}")()) for name in names}

    def arguments(self) -> tuple[int, int, int, int]:
        """Of the kernel in the body that was recorded last."""
        handle, num_active, arrivals, seen = self._library.stub_arguments()[:4]
        return handle, num_active, arrivals - DEVICE_OFFSET, seen


def goes_on(arguments: tuple[int, int, int, int]) -> bool:
    """What ``set_condition`` would say: it reads memory at the addresses that it was given."""
    _, num_active, arrivals, seen = arguments
    arrived = ctypes.c_int64.from_address(arrivals).value
    return (
        ctypes.c_int32.from_address(num_active).value > 0
        and arrived <= ctypes.c_int64.from_address(seen).value
    )
