"""The cores of a CPU that a server computes on.

vLLM pins its workers to the first cores that it may use. A second one on the machine takes the
same, and both crawl: this server takes others, or says whose they are. And vLLM keeps cores for the
host, which windows leave idle: on a small machine that is ours alone the model has them, too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

BIND = "VLLM_CPU_OMP_THREADS_BIND"
RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
WORKER = "VLLM::Worker"  # the title of a process that computes
# With more, a core is a small gain, and a host that wants it holds up the others: not measured.
MOST_CORES = 4
# Cores that other programs may be busy on, in the half second in which we look.
IDLE_CORES = 0.25
LOOK_SECONDS = 0.5


def held(allowed: set[int]) -> dict[int, int]:
    """Cores of ``allowed`` to which threads of some vLLM's workers are pinned, and whose."""
    found: dict[int, int] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if not process.cmdline()[:1] or not process.cmdline()[0].startswith(WORKER):
                continue
            for thread in os.listdir(f"/proc/{process.pid}/task"):
                cores = os.sched_getaffinity(int(thread)) & allowed
                if cores < allowed:
                    found.update(dict.fromkeys(cores, process.pid))
    return found


def siblings(core: int) -> set[int]:
    """The logical CPUs of a core, itself among them."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    found = {core}
    with contextlib.suppress(OSError, ValueError):
        for part in path.read_text().split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


def choose(
    allowed: Iterable[int], held_by: Mapping[int, int], groups: Mapping[int, set[int]]
) -> list[int]:
    """Cores to compute on beside those that are held: as vLLM takes them, all but the last free.

    One logical CPU of each core. ``groups``: the logical CPUs of the core that one is of.
    """
    taken = {cpu for core in held_by for cpu in groups[core]}
    free = sorted({max(groups[cpu]) for cpu in allowed} - taken)
    return free[:-1] or free


def settle() -> str | None:
    """Take free cores where others are held, through vLLM's own variable; what to tell, or None.

    A user who binds threads is left alone.
    """
    if not _may_choose():
        return None
    allowed = os.sched_getaffinity(0)
    held_by = held(allowed)
    if not held_by:
        return None
    groups = {cpu: siblings(cpu) & allowed for cpu in allowed}
    cores = choose(allowed, held_by, groups)
    pids = ", ".join(str(pid) for pid in sorted(set(held_by.values())))
    others = ",".join(map(str, sorted(held_by)))
    whose = f"cores {others} are another vLLM's (process {pids})"
    if not cores:
        return f"{whose}, and no other is left: both crawl; end it, or set {BIND} for each"
    os.environ[BIND] = ",".join(map(str, cores))
    return f"{whose}: this one computes on {os.environ[BIND]} ({BIND})"


def take_the_hosts() -> str:
    """Give the model the cores that vLLM keeps for the host, unless the user said how many; what
    the panel says of it, empty where nothing was done.

    Only on a small machine on which nobody else computes. After ``settle``.
    """
    if RESERVED in os.environ or not _may_choose():
        return ""
    num_cores = len({max(siblings(cpu)) for cpu in os.sched_getaffinity(0)})
    if not 1 < num_cores <= MOST_CORES or _busy_cores() > IDLE_CORES:
        return ""
    os.environ[RESERVED] = "0"
    return f"all {num_cores} for the model, none for the host alone ({RESERVED}=0)"


def _may_choose() -> bool:
    return os.environ.get(BIND, "auto") == "auto" and hasattr(os, "sched_getaffinity")


def _busy_cores() -> float:
    """Cores of the whole machine that are at work."""
    return float(psutil.cpu_percent(LOOK_SECONDS)) / 100 * (psutil.cpu_count() or 1)
