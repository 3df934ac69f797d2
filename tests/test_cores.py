"""A second vLLM on a machine: cores that are held, and those that it takes instead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from serving import wait_for

from fusedstep.vllm_plugin.launch import cores

PINNED = """
import os, sys, threading, time
from setproctitle import setproctitle
setproctitle(sys.argv[1])
def pin():
    if sys.argv[2]:
        os.sched_setaffinity(threading.get_native_id(), {int(sys.argv[2])})
    print("READY", flush=True)
    time.sleep(60)
threading.Thread(target=pin, daemon=True).start()
time.sleep(60)
"""


def pinned(title: str, core: str) -> subprocess.Popen[str]:
    """A process of this title, a thread of which is pinned."""
    command = [sys.executable, "-c", PINNED, title, core]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "READY\n"
    return process


@pytest.fixture
def others() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("allowed", "held", "siblings", "chosen"),
    (
        (range(2), [0], {}, [1]),
        (range(2), [0, 1], {}, []),
        (range(8), [0, 1, 2], {}, [3, 4, 5, 6]),  # the last is for the host, as vLLM has it
        (range(2, 6), [2], {}, [3, 4]),
        (range(4), [2], {0: {0, 2}, 2: {0, 2}, 1: {1, 3}, 3: {1, 3}}, [3]),  # a core's other half
    ),
)
def test_free_cores(
    allowed: range, held: list[int], siblings: dict[int, set[int]], chosen: list[int]
) -> None:
    groups = {core: {core} for core in allowed} | siblings
    assert cores.choose(allowed, dict.fromkeys(held, 1), groups) == chosen


def test_who_holds_which_core(
    others: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pinned thread of a vLLM's worker; not one that roams, nor another program's."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one core: a thread that is pinned to it is a thread that roams")
    mine = {process.pid for process in psutil.process_iter()}
    real = psutil.process_iter
    monkeypatch.setattr(psutil, "process_iter", lambda: (p for p in real() if p.pid not in mine))
    monkeypatch.delenv(cores.BIND, raising=False)
    first = min(allowed)
    others += [pinned("another program", str(first)), pinned(f"{cores.WORKER}-0", "")]
    assert cores.held(allowed) == {} and cores.settle() is None
    others.append(pinned(f"{cores.WORKER}-0", str(first)))
    holder = others[-1].pid
    wait_for("it is seen", lambda: cores.held(allowed) == {first: holder}, 5)
    told = cores.settle()
    chosen = os.environ.pop(cores.BIND)
    assert str(first) not in chosen.split(",") and told is not None
    assert f"(process {holder}): this one computes on {chosen}" in told
    for core in allowed - {first}:
        others.append(pinned(f"{cores.WORKER}-0", str(core)))
    told = cores.settle()
    assert told is not None and "no other is left" in told and cores.BIND not in os.environ
    monkeypatch.setenv(cores.BIND, "0")  # the user's own choice
    assert cores.settle() is None and os.environ[cores.BIND] == "0"


@pytest.mark.parametrize(
    ("set_by_user", "cores_here", "busy", "told"),
    (
        ({}, {0, 1}, 0.1, "all 2 for the model"),
        ({}, {0, 1, 2, 3}, 0.0, "all 4 for the model"),
        ({}, {0, 1}, 0.6, ""),  # somebody else's machine, too
        ({}, {0}, 0.0, ""),
        ({}, set(range(8)), 0.0, ""),  # a core is an eighth there, and a late one holds up seven
        ({cores.RESERVED: "1"}, {0, 1}, 0.0, ""),
        ({cores.BIND: "0"}, {0, 1}, 0.0, ""),
    ),
)
def test_the_hosts_cores(
    set_by_user: dict[str, str],
    cores_here: set[int],
    busy: float,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model has the host's cores on a small machine that is idle, where nobody chose."""
    for name in (cores.RESERVED, cores.BIND):
        monkeypatch.setenv(name, "")  # taken back with what the test sets
        monkeypatch.delenv(name)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores_here)
    monkeypatch.setattr(cores, "siblings", lambda core: {core})
    monkeypatch.setattr(cores, "_busy_cores", lambda: busy)
    words = cores.take_the_hosts()
    assert words.startswith(told) and bool(words) == bool(told)
    reserved = {cores.RESERVED: "0"} if told else {}
    names = (cores.RESERVED, cores.BIND)
    assert {n: os.environ[n] for n in names if n in os.environ} == set_by_user | reserved


def test_how_busy_the_machine_is(others: list[subprocess.Popen[str]]) -> None:
    """A program that computes counts as about a core, whatever else runs here."""
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    others.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    stdout = others[-1].stdout
    assert stdout is not None and stdout.readline()
    busy = cores._busy_cores()
    assert cores.IDLE_CORES < busy <= (psutil.cpu_count() or 1) + 0.1
