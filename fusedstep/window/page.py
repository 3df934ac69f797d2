"""Shared memory with one writer and many readers; holds one JSON object."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fusedstep import processes

SIZE = 1 << 16  # bytes, the header included
HEADER = 16  # two int64: times written (odd while it is being written), bytes of text
PATIENCE = 0.1  # seconds that a reader waits for a writer


def shared_file(name: str) -> Path:
    """The file through which processes of this machine share memory by name."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
    path = Path(folder, f"fusedstep-{name}")
    processes.remove_at_end(path)
    return path


class Page:
    """JSON of up to 64 KiB. One writer; a reader gets what was written last, whole."""

    def __init__(self, name: str) -> None:
        self.path = shared_file(name)
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            file.truncate(SIZE)
            self._bytes = np.memmap(file, dtype=np.uint8, mode="r+", shape=(SIZE,))
        self._header = self._bytes[:HEADER].view(np.int64)

    def write(self, value: Any) -> None:
        """Raises ValueError for what does not fit."""
        text = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        if len(text) > SIZE - HEADER:
            raise ValueError(f"{len(text)} bytes do not fit into a page of {SIZE}")
        self._header[0] += 1
        self._bytes[HEADER : HEADER + len(text)] = text
        self._header[1] = len(text)
        self._header[0] += 1

    def read(self) -> Any:
        """The last object written; None before the first, or if the writer died writing."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            times, length = int(self._header[0]), int(self._header[1])
            text = self._bytes[HEADER : HEADER + length].tobytes()
            if times == 0:
                return None
            if times % 2 == 0 and times == int(self._header[0]):
                return json.loads(text)
        return None

    def unlink(self) -> None:
        """Everybody has it mapped: its name is needed no more."""
        self.path.unlink(missing_ok=True)
