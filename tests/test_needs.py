"""What ``doctor`` tries for ``serve``: folders, memory, shared memory, port, cores."""

from __future__ import annotations

import os
import socket
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from fusedstep import demo, needs
from fusedstep.cli.main import group
from fusedstep.needs import GIB
from fusedstep.vllm_plugin.launch import early

Disk = namedtuple("Disk", "free")


def test_here_all_is_well_or_has_advice() -> None:
    found = {check.name: check for check in needs.checks(on_gpu=False)}
    assert list(found) == [
        "cache folder",
        "kernel cache",
        "temporary folder",
        "memory",
        "shared memory",
        "port",
        "cores",
    ]
    for check in found.values():
        assert check.status != "problem" and bool(check.advice) == (check.status == "warning")


def test_an_unwritable_cache_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the command too: it said that `serve` works."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert needs.cache_folder().status == "ok"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check = needs.cache_folder()
    assert check.status == "problem" and "XDG_CACHE_HOME" in check.advice
    assert check.found == f"cannot write {tmp_path}/file/fusedstep (Not a directory)"
    result = CliRunner().invoke(group, ["doctor"])
    assert result.exit_code == 2 and "serve does not work here yet" in result.stdout
    monkeypatch.setattr(demo, "find_made", lambda: tmp_path)  # nothing is to be written then
    check = needs.cache_folder()
    assert check.status == "warning" and "VLLM_CACHE_ROOT" in check.advice
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert needs.cache_folder().status == "ok"


def test_a_full_cache_folder_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: Disk(needs.MODEL_BYTES - 1))
    check = needs.cache_folder()
    assert check.status == "problem" and "make room" in check.advice


def test_kernels_that_can_be_cached_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise RuntimeError("cannot cache function '_accept': no locator available for file")

    monkeypatch.setattr(needs.importlib, "import_module", import_module)
    check = needs.kernel_cache()
    assert check.status == "problem" and "NUMBA_CACHE_DIR" in check.advice


@pytest.mark.parametrize(
    ("gib", "cgroup", "kv_cache", "status"),
    (
        (16.0, None, "", "ok"),
        (2.0, None, "", "warning"),
        (1.0, None, "", "problem"),
        (16.0, "max", "", "ok"),
        (16.0, 1.0, "", "problem"),  # a container's share
        (16.0, 6.0, "", "ok"),
        (16.0, None, "15", "warning"),  # the user sized the KV cache
        (18.0, None, "15", "ok"),
    ),
)
def test_memory(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gib: float,
    cgroup: float | str | None,
    kv_cache: str,
    status: str,
) -> None:
    available = SimpleNamespace(available=int(gib * GIB))
    monkeypatch.setattr(needs.psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(needs, "CGROUP", tmp_path)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", kv_cache)
    if cgroup is not None:
        limit = cgroup if isinstance(cgroup, str) else str(int(cgroup * GIB))
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{GIB}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    check = needs.memory()
    assert check.status == status, check
    assert bool(check.advice) == (status != "ok")


@pytest.mark.parametrize(("free", "status"), ((79, "ok"), (70, "problem")))
def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free * GIB, 80 * GIB))
    check = needs.gpu_memory()
    assert check.status == status
    assert ("--gpu-memory-utilization 0.87" in check.advice) == (status != "ok")


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert needs.shared_memory(tmp_path).status == "ok"
    assert needs.shared_memory(tmp_path / "none").status == "ok"
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: Disk(needs.SHM_BYTES - 1))
    assert needs.shared_memory(tmp_path).status == "warning"
    monkeypatch.setattr(needs, "why_not_writable", lambda _: "Permission denied")
    check = needs.shared_memory(tmp_path)
    assert check.status == "problem" and "--shm-size" in check.advice


def test_a_port_in_use_names_a_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(early, "PORT", taken.getsockname()[1])
        check = needs.port()
    assert check.status == "warning"
    early.check_port("127.0.0.1", int(check.advice.rpartition("--port ")[2]))
    assert needs.port().status == "ok"


@pytest.mark.parametrize(
    ("load", "quota", "status"),
    ((0.1, "max 100000", "ok"), (9.0, "max 100000", "warning"), (0.1, "100000 100000", "warning")),
)
def test_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load: float, quota: str, status: str
) -> None:
    monkeypatch.setattr(needs.psutil.Process, "cpu_affinity", lambda _: [0, 1], raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(needs, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text(quota)
    assert needs.cores().status == status
