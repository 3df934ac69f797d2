"""vLLM's output in a log file, and what a user wants to see of it while the server starts.

The log is where this process's and all its children's stdout and stderr go. A thread reads it: it
tells the stages of the start, warnings of ours and errors, and when the server answers.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from fusedstep import demo

MAX_BYTES = 64 << 20  # of a log; the part before it is kept beside it
LOOK_SECONDS, UP_LOOK_SECONDS = 0.2, 1.0
TAIL_LINES = 15
LOGS = 20  # that are kept: the newest
STAGES = (
    ("Initializing a V1 LLM engine", "starting the workers"),
    ("Starting to load model|Loading model from scratch", "loading the weights"),
    ("Model loading took", "preparing the KV cache"),
    ("Warming up model for the compilation|Start compiling function", "compiling the model"),
    ("Capturing( \\w+)? CUDA graphs", "recording CUDA graphs"),
    ("init engine .* took", "starting the server"),
)
RECORD = re.compile(r"(?:\([^)]*\) )?(WARNING|ERROR|CRITICAL) \S+ \S+ \[[^]]*\] (.*)")


class Display(Protocol):
    """Shows what happens, on the terminal or as plain lines."""

    def say(self, words: str) -> None: ...
    def warn(self, words: str) -> None: ...
    def ready(self, log: Path | None, warnings: int) -> None: ...
    def restore(self) -> None: ...  # the terminal, as this process ends without another word


class Watch:
    """The thread: it reads the log, if there is one, and asks whether the server is up."""

    def __init__(self, display: Display, log: Path | None) -> None:
        self.display, self.log = display, log
        self._is_up: Callable[[], bool] | None = None
        self.warnings = 0
        self._rest = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quiet", daemon=True)
        self._thread.start()

    def until(self, is_up: Callable[[], bool]) -> None:
        """How to find out whether the server is up, now that it is known where it will listen."""
        self._is_up = is_up

    def end(self) -> None:
        self._end.set()
        self._thread.join(UP_LOOK_SECONDS)

    def _run(self) -> None:
        up = False
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(self.log.open(errors="replace")) if self.log else None
            while not self._end.wait(UP_LOOK_SECONDS if up else LOOK_SECONDS):
                if file is not None and self.log is not None:
                    self._read(file.read(), up)
                    if file.tell() > MAX_BYTES:
                        shutil.copyfile(self.log, f"{self.log}.1")
                        os.truncate(self.log, 0)  # who writes to it appends
                        file.seek(0)
                if not up and self._is_up is not None and self._is_up():
                    up = True
                    self.display.ready(self.log, self.warnings)
                if up and file is None:
                    return

    def _read(self, new: str, up: bool) -> None:
        """Tell what is in some new text; of several errors at once the first."""
        *lines, self._rest = (self._rest + new).split("\n")
        told = False
        for line in lines:
            record = RECORD.match(line)
            level, words = record.groups() if record else ("", line)
            self.warnings += level == "WARNING"
            if level in ("ERROR", "CRITICAL"):
                if not told:
                    self.display.warn(words)
                told = True
            elif level and words.startswith("fusedstep: "):
                self.display.warn(words)
            elif not up:
                stage = next((say for found, say in STAGES if re.search(found, words)), None)
                if stage is not None:
                    self.display.say(stage)


def log_file(name: str) -> Path:
    """A new file for the output of the server of this name (its port), readable by its owner."""
    folder = demo.cache_folder() / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"serve-{name}.log"
        logs = sorted(folder.glob("serve-*"), key=lambda log: log.stat().st_mtime)
        for old in logs[: 1 - LOGS]:
            old.unlink(missing_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        return path
    except OSError:  # it cannot be written
        number, temporary = tempfile.mkstemp(prefix="fusedstep-serve-", suffix=".log")
        os.close(number)
        return Path(temporary)


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Until the end stdout and stderr of this process, and of those it starts, are this file."""
    saved = {number: os.dup(number) for number in (1, 2)}
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    _flush()
    for number in saved:
        os.dup2(file, number)
    os.close(file)
    try:
        yield
    finally:
        _flush()
        for number, before in saved.items():
            os.dup2(before, number)
            os.close(before)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def tail(log: Path) -> list[str]:
    """The last lines of a log."""
    return log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
