"""Needs of ``fusedstep serve`` of this machine beside its software: tried, not assumed."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from fusedstep import demo
from fusedstep.errors import ConfigError
from fusedstep.vllm_plugin.launch import early, wiring

Status = Literal["ok", "warning", "problem"]  # a problem keeps `serve` from working

GIB = wiring.GIB
MODEL_BYTES = 300 << 20  # of the bundled model
# vLLM, imported, without model and KV cache: 0.53 GiB in the server's and in the engine's process.
VLLM_BYTES = int(1.06 * GIB)
SHM = Path("/dev/shm")
SHM_BYTES = 64 << 20  # what containers have by default; vLLM's processes talk through it
GPU_SHARE = 0.92  # vLLM's default of --gpu-memory-utilization
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``advice`` says what to do, in one line; empty when all is well."""

    name: str
    status: Status
    found: str
    advice: str = ""


def checks(*, on_gpu: bool) -> Iterator[Check]:
    """All of them, for a server of the bundled model with its default options."""
    yield cache_folder()
    if not on_gpu:
        yield kernel_cache()
    yield temporary_folder()
    yield gpu_memory() if on_gpu else memory()
    yield shared_memory()
    yield port()
    yield cores()


def why_not_writable(folder: Path) -> str | None:
    """Make the folder, write a file there; the reason in words where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return error.strerror or str(error)
    return None


def cache_folder() -> Check:
    """For the bundled model, until it is made, and for what vLLM keeps (compiled graphs)."""
    folder = demo.cache_folder()
    vllm = os.environ.get("VLLM_CACHE_ROOT")
    cache = Path(vllm).expanduser() if vllm else folder.parent / "vllm"
    made = demo.find_made() is not None
    if not made and (reason := why_not_writable(folder)):
        advice = "set XDG_CACHE_HOME to a folder with 300 MB free, or serve a model of your own"
        return Check("cache folder", "problem", f"cannot write {folder} ({reason})", advice)
    if not made and (free := shutil.disk_usage(folder).free) < MODEL_BYTES:
        advice = "make room there, or set XDG_CACHE_HOME to a folder with 300 MB free"
        return Check("cache folder", "problem", f"{free >> 20} MiB free in {folder}", advice)
    if reason := why_not_writable(cache):
        advice = "set VLLM_CACHE_ROOT to a folder that can be written: vLLM keeps compiled models"
        return Check("cache folder", "warning", f"cannot write {cache} ({reason})", advice)
    return Check("cache folder", "ok", str(folder.parent))


def kernel_cache() -> Check:
    """Numba refuses to load a kernel that it can cache nowhere."""
    try:
        importlib.import_module("fusedstep.ops.native_rows")
    except Exception as error:
        reason = " ".join(str(error).split())
        advice = "set NUMBA_CACHE_DIR to a folder that can be written"
        return Check("kernel cache", "problem", reason, advice)
    return Check("kernel cache", "ok", "the CPU's kernels load")


def temporary_folder() -> Check:
    """vLLM's processes meet at sockets there."""
    try:
        folder = Path(tempfile.gettempdir())
    except OSError:
        return Check(
            "temporary folder", "problem", "none can be written", "set TMPDIR to one that can"
        )
    return Check("temporary folder", "ok", str(folder))


def memory() -> Check:
    """The bundled model, its KV cache and vLLM's processes against what is free."""
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # a container's share; "max": no bound
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used -= int(stat.get("inactive_file", 0))  # cached files make room
        available = min(available, max(limit - used, 0))
    kv_cache = wiring.cpu_kv_cache_bytes(available)
    needed = MODEL_BYTES + VLLM_BYTES
    found = (
        f"{available / GIB:.1f} GiB free; vLLM {VLLM_BYTES / GIB:.1f}, bundled model "
        f"{MODEL_BYTES / GIB:.1f}, KV cache {kv_cache / GIB:.1f} GiB"
    )
    if needed > available:
        return Check("memory", "problem", found, "end other programs, or give it more")
    if needed + kv_cache > available:  # its pages are touched one by one, under load
        advice = "free some, or take a smaller KV cache: fusedstep serve --kv-cache-memory-bytes N"
        return Check("memory", "warning", found, advice)
    return Check("memory", "ok", found)


def gpu_memory() -> Check:
    """vLLM takes a share of all memory, or does not start."""
    import torch

    free, total = torch.cuda.mem_get_info(0)
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free on the GPU"
    if free < GPU_SHARE * total:
        share = int(100 * free / total) / 100
        advice = f"end what uses it, or fusedstep serve --gpu-memory-utilization {share:.2f}"
        return Check("memory", "problem", found, advice)
    return Check("memory", "ok", found)


def shared_memory(folder: Path = SHM) -> Check:
    """Counters of the windows, and messages between vLLM's processes."""
    if not folder.is_dir():
        return Check("shared memory", "ok", f"no {folder}: files in the temporary folder instead")
    reason = why_not_writable(folder)
    if reason is not None:
        advice = f"let this user write {folder} (containers: --shm-size=1g, --ipc=host)"
        return Check("shared memory", "problem", f"cannot write {folder} ({reason})", advice)
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.2f} GiB free in {folder}"
    if free < SHM_BYTES:
        advice = "give it more (containers: --shm-size=1g, --ipc=host)"
        return Check("shared memory", "warning", found, advice)
    return Check("shared memory", "ok", found)


def port() -> Check:
    """The port of `serve` unless it is told otherwise."""
    try:
        early.check_port(early.HOST, early.PORT)
    except ConfigError:
        advice = f"end what listens there, or choose another: fusedstep serve --port {_free_port()}"
        return Check("port", "warning", f"{early.HOST}:{early.PORT} is in use", advice)
    return Check("port", "ok", f"{early.HOST}:{early.PORT} is free")


def _free_port() -> int:
    for number in range(early.PORT + 1, early.PORT + 100):
        with contextlib.suppress(ConfigError):
            early.check_port(early.HOST, number)
            return number
    return 0


def cores() -> Check:
    """The model computes on all cores but one; other work on them is waited for."""
    count = float(
        len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else os.cpu_count() or 1
    )
    with contextlib.suppress(OSError, ValueError):  # a container's share; "max": no bound
        quota, period = (CGROUP / "cpu.max").read_text().split()
        count = min(count, int(quota) / int(period))
    load = os.getloadavg()[0]
    found = f"{count:g}, {max(count - load, 0):.1f} of them free"
    if count < 2:
        return Check("cores", "warning", found, "give it two: the server and the model share one")
    if load > count / 2:
        return Check("cores", "warning", found, "end other work: the model waits for its cores")
    return Check("cores", "ok", found)
