"""Repaired faults of the CUDA path are put back, one by one: the test that is named must fail.

    .venv/bin/pytest -m mutations tests/test_mutations.py

Minutes of it. Every run checks that all of them can still be put back, and does one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from libcuda import stub
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
TREE = {"bench": "bench", "cli": "cli", "kernels": "triton_kernels"}  # import name -> folder
PASSED, FAILED, HANGS = 0, 1, -1  # pytest's exit codes
SECONDS = 600
ROW = re.compile(r"^\| (?P<fault>.+?) \| .+ \| `(?P<test>[^`]+\.py)`: (?P<names>`.+`) \|$")


@cache
def _copy(folder: Path) -> Path:
    """The packages and their tests, importable from there."""
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fusedstep", folder / "fusedstep", ignore=without)
    for name, source in TREE.items():
        shutil.copytree(ROOT / source, folder / "fusedstep" / name, ignore=without)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=without)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def _run(folder: Path, test: str, name: str) -> int:
    """pytest's exit code for these tests of the copy, -1 if they do not end; nothing stays."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", name, f"tests/{test}"]
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "pytest", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        print(child.communicate(timeout=SECONDS)[0])
        return child.returncode
    except subprocess.TimeoutExpired:
        return HANGS
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # engines that it has started
        child.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _copy(tmp_path_factory.mktemp("tree") / "copy")


@cache
def _passes(folder: Path, test: str) -> bool:
    """Do the tests of this file, all that some fault names, pass without a fault?"""
    names = dict.fromkeys(mutation.name for mutation in MUTATIONS if mutation.test == test)
    return _run(folder, test, " or ".join(names)) == PASSED


@pytest.mark.parametrize(
    "mutation",
    [pytest.param(m, id=m.id, marks=() if m.quick else pytest.mark.mutations) for m in MUTATIONS],
)
def test_a_fault_that_is_put_back_is_caught(mutation: Mutation, folder: Path) -> None:
    if mutation.test.startswith("libcuda/") and (
        reason := next(filter(None, map(stub.missing, stub.BINDINGS)), None)
    ):
        pytest.skip(reason)
    assert _passes(folder, mutation.test), "it fails without the fault, too"
    path = folder / mutation.path
    text = path.read_text("utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), "utf-8")
    try:
        ended = _run(folder, mutation.test, mutation.name)
    finally:
        path.write_text(text, "utf-8")
    assert ended in ((FAILED, HANGS) if mutation.may_hang else (FAILED,)), mutation.fault


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)
def test_a_fault_can_be_put_back(mutation: Mutation) -> None:
    """Its place is still there, the result is Python, and its test exists."""
    text = (ROOT / mutation.path).read_text("utf-8")
    assert text.count(mutation.old) == 1
    compile(text.replace(mutation.old, mutation.new), mutation.path, "exec")
    names = re.findall(r"def (test_\w+)", (ROOT / "tests" / mutation.test).read_text("utf-8"))
    assert any(mutation.name in name for name in names)


def test_the_page_lists_them() -> None:
    listed: dict[tuple[str, str], set[str]] = {}
    for line in (ROOT / "docs" / "stand-in.md").read_text("utf-8").splitlines():
        if (row := ROW.match(line)) is not None:
            names = set(re.findall(r"`([^`]+)`", row["names"]))
            listed[row["fault"], row["test"]] = names
    wanted: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for mutation in MUTATIONS:
        wanted[mutation.fault, mutation.test].add(mutation.name)
    assert listed == wanted
