"""A ``fusedstep serve`` of its own: start it, watch it, end it, look for what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

SMALL = ("--dtype=float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4")
KV_CACHE = ("--kv-cache-memory-bytes", "268435456")
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
START_SECONDS = 600.0
END_SECONDS = 30.0  # on a busy machine; what is promised: tests/engine/test_orphans.py
FUSEDSTEP = str(Path(sys.executable).with_name("fusedstep"))


def free_port() -> int:
    """Below those that the kernel gives: none of another test's connections takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(what: str, done: Callable[[], bool], seconds: float) -> None:
    """Poll until ``done``; AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


def _alive(process: psutil.Process) -> bool:
    """A zombie waits for a parent to take note: it has ended."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Server:
    """One server in a session (and process group) of its own, as under a terminal."""

    def __init__(
        self,
        log: Path,
        *args: str,
        command: Sequence[str] = (FUSEDSTEP, "serve", "--verbose"),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *args, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=(env or os.environ) | {"VLLM_NO_USAGE_STATS": "1"},
                cwd=log.parent,
                start_new_session=True,
            )
        self.main = psutil.Process(self.process.pid)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_up(self) -> None:
        def up() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.tail()}"
            try:
                return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
            except (urllib.error.URLError, OSError):
                return False

        wait_for("the server answers", up, START_SECONDS)

    def gauge(self, name: str) -> float:
        """Value of a gauge of /metrics."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=10).read().decode()
        found = re.search(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no {name} in /metrics"
        return float(found[1])

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text().splitlines()[-lines:])

    def end(self, number: signal.Signals, *, group: bool) -> int:
        """Send a signal to the main process or to all; the exit code. Nothing may be left."""
        children = self.main.children(recursive=True)
        send = os.killpg if group else os.kill
        send(self.process.pid, number)
        try:
            code = self.process.wait(END_SECONDS)
            wait_for("its processes end", lambda: not any(map(_alive, children)), END_SECONDS)
        finally:
            self.kill()
        logs = [self.log, *([log] if (log := self.vllm_log()) else [])]
        assert not any("Traceback" in each.read_text() for each in logs), self.tail()
        return code

    def vllm_log(self) -> Path | None:
        """Where vLLM's output goes, if it is not shown: the panel says so."""
        found = re.search(r"│ log +(\S+\.log)", self.log.read_text())
        return Path(found[1]) if found else None

    def kill(self) -> None:
        """Whatever happened: nothing of this server goes on."""
        if self.main.is_running():
            for child in self.main.children(recursive=True):
                child.kill()
        self.process.kill()
        self.process.wait()
