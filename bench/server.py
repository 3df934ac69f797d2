"""One OpenAI server, stock or ours, in a process group of its own.

Its log is a temporary file. A server that is not being measured is stopped (SIGSTOP), which is
sound while no request is in flight: vLLM's processes set each other no deadlines then, its clients
have gone, and a connection that came all the same would wait in the kernel.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Self

import psutil

from fusedstep import processes
from fusedstep.errors import ConfigError, FusedStepError
from fusedstep.options import Options, flag
from fusedstep.vllm_plugin.launch import early, wiring

Kind = Literal["stock", "fusedstep"]
KINDS: tuple[Kind, ...] = ("stock", "fusedstep")
HOST = "127.0.0.1"
START_SECONDS = 900.0  # a large model on a GPU is loaded, compiled and captured
END_SECONDS = 30.0
OURS = ("--host", "--port", "--uds")  # the options of the server that are not the caller's
COMMAND = (sys.executable, "-P", "-c", "from fusedstep.cli import main; main()", "serve")
VERBOSE = "--verbose"  # the log is read here
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"


class Server:
    """``fusedstep serve``. Raises where it does not come up; ``close`` ends it in any case."""

    def __init__(
        self,
        kind: Kind,
        options: Options,
        vllm_args: tuple[str, ...],
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        check(options, vllm_args)
        self.kind, self.port = kind, _free_port()
        given = options.as_dict()
        ours = [part for name in given for part in (flag(name), given[name])]
        args = [*vllm_args, *(["--stock"] if kind == "stock" else ours)]
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (see ``close``)
        self.process = subprocess.Popen(
            [*COMMAND, VERBOSE, *args, "--host", HOST, "--port", str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**environment(), **variables, **processes.environment()},
            start_new_session=True,
        )
        self.main = psutil.Process(self.process.pid)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def wait_until_up(self, seconds: float = START_SECONDS) -> None:
        """Poll until the server answers.

        Raises:
            ConfigError: it ended; the message is the reason it gave.
            FusedStepError: it does not answer after ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while not self._answers():
            if self.process.poll() is not None:
                lines = self.log().splitlines()
                said = [line for line in lines if line.startswith("error: ")] or lines
                reason = said[-1].removeprefix("error: ") if said else "it ended and said nothing"
                raise ConfigError(f"the {self.kind} server: {reason}")
            if time.monotonic() > deadline:
                raise FusedStepError(f"the {self.kind} server is not up after {seconds:g} s")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def metrics(self, seconds: float = 30) -> dict[str, float]:
        """Gauges and counters of /metrics by name, summed over their labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=seconds) as answer:
            text = answer.read().decode()
        totals: dict[str, float] = {}
        for name, value in re.findall(r"^([a-z_:]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def wait_until_idle(self, seconds: float) -> dict[str, float]:
        """Requests and KV cache in use after at most ``seconds``, if not zero: {} is idle."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.metrics()
            left = {name: found[name] for name in (RUNNING, WAITING, KV_USAGE) if found[name]}
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """The server and all that it started."""
        try:
            return [self.main, *self.main.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def rss_bytes(self) -> int:
        """Resident memory of all its processes; pages that they share count more than once."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def log(self) -> str:
        """Its output so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def tail(self, lines: int = 5) -> str:
        """The end of the log."""
        return "\n".join(self.log().splitlines()[-lines:])

    def stop_clock(self) -> None:
        """Take every thread of the server off the cores."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def end(self, number: signal.Signals, seconds: float = END_SECONDS) -> int | None:
        """Signal the main process; its exit code, None where it goes on after ``seconds``."""
        self.process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def close(self, *, at_once: bool = False) -> None:
        """End the server and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            self.go_on()
        if self.process.poll() is None and not at_once:
            self.end(signal.SIGINT, seconds=10)
        processes.end_session(self.process.pid)
        self.process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.close(at_once=error is not None)


def check(options: Options, vllm_args: tuple[str, ...]) -> None:
    """Raises ConfigError for what no server could start with, before the first one is started."""
    wiring.check(options)
    model = early.model_of(vllm_args)
    if model is not None:
        early.check_folder(model)
    for arg in vllm_args:
        if arg.partition("=")[0] in OURS:
            raise ConfigError(f"{arg.partition('=')[0]} is chosen here: leave it out")


def environment() -> dict[str, str]:
    """Of servers and clients: neither switches the plugin on from outside."""
    from fusedstep.vllm_plugin.compat import SWITCH

    found = {name: value for name, value in os.environ.items() if name != SWITCH}
    return {"VLLM_NO_USAGE_STATS": "1"} | found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
