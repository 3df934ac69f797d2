"""A trace of an engine's turns: what its processes write down while somebody asks for it.

A page of shared memory says whether somebody does; the name of the page is in the server's metrics.
Who asks makes a file and writes its number into the page. The engine's processes append their
records to that file, a line of JSON each; nobody keeps it open. While nobody asks there is no file,
and a turn costs one look at the page.

All times are of CLOCK_MONOTONIC, one for all processes of a machine, in nanoseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusedstep import processes

SIZE = 24  # bytes of the page: three int64, see TracePage
MAX_BYTES = 1 << 28  # of a file: what comes later is left out
END_SECONDS = 10.0  # that the turns under way may take to come back


class TracePage:
    """The file that is asked for (0: none), until when, and the turns that are still to come back.

    The first two are written by who asks, the third by the engine core.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Raises OSError where there is none and none is to be made."""
        self.path = path
        flags = os.O_RDWR | (os.O_CREAT if create else 0)
        with open(os.open(path, flags, 0o600), "r+b") as file:
            if create:
                file.truncate(SIZE)
            self.words = memoryview(mmap.mmap(file.fileno(), SIZE)).cast("q")

    def unlink(self) -> None:
        self.path.unlink(missing_ok=True)


def append(page: Path, number: int, record: dict[str, Any]) -> None:
    """A line for the file ``number``, if it is still there and not full.

    Lines are appended whole, by any thread of any process.
    """
    line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
    with contextlib.suppress(OSError):
        file = os.open(file_of(page, number), os.O_WRONLY | os.O_APPEND)
        try:
            if os.fstat(file).st_size < MAX_BYTES:
                os.write(file, line)
        finally:
            os.close(file)


def file_of(page: Path, number: int) -> Path:
    return page.with_name(f"{page.name}-{number}")


class Busy(Exception):
    """Another process traces this engine."""


@contextlib.contextmanager
def asking(page: TracePage, seconds: float) -> Iterator[Path]:
    """A file that fills with records, for ``seconds`` at most; it goes at the end.

    Raises Busy, or OSError where the file cannot be made.
    """
    number = time.monotonic_ns()
    path = file_of(page.path, number)
    processes.remove_at_end(path)
    with page.path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Busy from None
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        try:
            page.words[1] = number + int(1e9 * seconds)
            page.words[0] = number
            yield path
        finally:
            page.words[0] = 0
            path.unlink(missing_ok=True)


def finish(page: TracePage) -> None:
    """No new turns; those that are under way have come back, or do not within END_SECONDS."""
    page.words[0] = 0
    deadline = time.monotonic() + END_SECONDS
    while page.words[2] and time.monotonic() < deadline:
        time.sleep(0.01)
