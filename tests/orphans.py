"""Starts a command, ends it in some way at some moment, and tells what it leaves behind.

    python orphans.py JSON

It is a subreaper: whatever the command starts stays below it, orphans and daemons too. It prints
what was there before the end, and the processes and files that were left ten seconds after it
(``Clock``).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PR_SET_CHILD_SUBREAPER = 36
START_SECONDS = 600.0
END_SECONDS = 10.0
WORKING = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)


class Driver:
    """Such a process, for a test: ``spec`` is what it is told."""

    def __init__(self, folder: Path, command: tuple[str, ...], end: str, **spec: Any) -> None:
        folder.mkdir()
        spec |= {"folder": str(folder), "command": command, "end": end}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(spec)], stdout=subprocess.PIPE, text=True
        )

    def result(self) -> Any:
        out, _ = self.process.communicate(timeout=START_SECONDS + 60)
        return json.loads(out)


def below() -> list[psutil.Process]:
    """Every living process that the command has started, itself included."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if status(process) not in (None, psutil.STATUS_ZOMBIE)]


def status(process: psutil.Process) -> str | None:
    try:
        return str(process.status())
    except psutil.Error:
        return None


def words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def titled(title: str, wanted: str | None = None) -> list[psutil.Process]:
    """vLLM's processes with this title, in this state."""
    found = [process for process in below() if words(process).startswith(f"VLLM::{title}")]
    return [process for process in found if wanted in (None, status(process))]


def files(folder: Path) -> set[str]:
    """The command's shared memory, and its temporary files of ours."""
    found = {str(path) for path in folder.glob("fusedstep-*")}
    for process in below():
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            found |= set(re.findall(r"/dev/shm/\S+", maps))
    return found


class Clock:
    """Seconds since the end, as a machine with a core for everyone would count them: while a
    process that is left works, what counts is the time that it had a core."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._now = time.monotonic()
        self._used = {process: used(process) for process in below()}

    def tick(self) -> list[psutil.Process]:
        """What is left now."""
        left = below()
        now, before = time.monotonic(), self._used
        self._used = {process: used(process) for process in left}
        passed, self._now = now - self._now, now
        if any(status(process) in WORKING for process in left):
            had = (self._used[each] - before.get(each, self._used[each]) for each in left)
            passed = min(passed, max(had))
        self.seconds += passed
        return left


def used(process: psutil.Process) -> float:
    """Seconds that it has had a core."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def wait_for(done: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not done():
        assert process.poll() is None, f"it ended by itself: {log.read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"not so far: {log.read_text()[-2000:]}"
        time.sleep(0.05)


def main(spec: dict[str, Any]) -> dict[str, Any]:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder = Path(spec["folder"])
    log = folder.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            spec["command"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"TMPDIR": str(folder), "VLLM_NO_USAGE_STATS": "1"}
            | spec.get("env", {}),
            start_new_session=True,
        )
    stopped: set[psutil.Process] = set()

    def all_were_stopped() -> bool:
        stopped.update(titled("EngineCore", psutil.STATUS_STOPPED))
        return bool(stopped) and stopped == set(titled("EngineCore"))

    moments: dict[str, Callable[[], object]] = {
        "child": lambda: len(below()) > 1,
        "engine": lambda: titled("EngineCore"),  # it starts
        "worker": lambda: titled("Worker"),  # it loads the model
        "stopped": lambda: titled("EngineCore", psutil.STATUS_STOPPED),
        "turns": lambda: all_were_stopped() and len(stopped) > 1,  # they are measured
        "said": lambda: spec["word"] in log.read_text(errors="replace"),
    }
    began = time.monotonic()
    wait_for(moments[spec["moment"]], process, log)
    time.sleep(spec.get("seconds", 0))
    started = time.monotonic() - began
    seen = sorted(f"{status(p)} {words(p)[:60]}" for p in below())
    held = files(folder)
    if spec["end"] in ("frozen", "no guardian"):  # and then it is killed
        # Its command line is its parent's until it has begun: it would be frozen with the others.
        guarded = lambda: any("guardian.py" in words(other) for other in below())  # noqa: E731
        wait_for(guarded, process, log)
        for other in below():
            guards = "guardian.py" in words(other)
            if spec["end"] == "no guardian" and guards:
                other.kill()
            elif spec["end"] == "frozen" and not guards and other.pid != process.pid:
                other.suspend()
        process.kill()
    elif spec["end"] in ("EngineCore", "Worker"):  # this is killed, as for want of memory
        # Of an engine that is awake: the death of one that sleeps is heard of when its turn comes.
        awake = (p for p in titled(spec["end"]) if status(p) != psutil.STATUS_STOPPED)
        next(awake).kill()
    elif spec["end"] == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    elif spec["end"] != "itself":
        process.send_signal(getattr(signal, spec["end"]))
    clock = Clock()
    while (left := clock.tick()) and clock.seconds < spec.get("patience", END_SECONDS):
        process.poll()
        time.sleep(0.05)
    kept = sorted(name for name in held if Path(name).exists())
    result = {
        "code": process.poll(),
        "started": started,
        "seconds": clock.seconds,
        "seen": seen,
        "left": [f"{status(p)} {words(p)[:100]}" for p in left],
        "files": kept,
        "log": log.read_text(errors="replace")[-3000:],
    }
    for name in kept:
        if name.startswith("/dev/shm/"):
            Path(name).unlink()
    return result


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.loads(sys.argv[1]))))
    finally:
        for left in below():
            left.kill()
