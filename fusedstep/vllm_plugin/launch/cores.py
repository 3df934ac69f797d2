"""Cores of a CPU that another vLLM computes on: this server takes others, or says whose they are.

vLLM pins its workers to the first cores that it may use. A second one on the machine takes the
same, and both crawl.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

BIND = "VLLM_CPU_OMP_THREADS_BIND"
WORKER = "VLLM::Worker"  # the title of a process that computes


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
    if os.environ.get(BIND, "auto") != "auto" or not hasattr(os, "sched_getaffinity"):
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
