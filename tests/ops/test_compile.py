"""What TritonStep launches compiles for GPUs that are not here, in their registers and in order."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE

import pytest

TESTS = Path(__file__).resolve().parent.parent
KERNELS = TESTS.parent / "triton_kernels"


def kernels() -> set[str]:
    """Names of everything that is launched: ``*_kernel`` of the device code."""
    functions = (
        node
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    )
    return {function.name for function in functions if function.name.endswith("_kernel")}


def test_the_interpreter_is_no_choice_of_child_processes() -> None:
    """The conftest switches it on in this process alone: stock vLLM must not see it."""
    assert "TRITON_INTERPRET" not in os.environ


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this platform")
def test_kernels_compile_without_spills() -> None:
    """Every specialisation for Ampere, Hopper, Blackwell and MI300, by two processes."""
    command = [sys.executable, "-W", "ignore", "-m", "ops.compile_kernels"]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    processes = [
        subprocess.Popen(
            [*command, *targets], cwd=TESTS, env=env, text=True, stdout=PIPE, stderr=PIPE
        )
        for targets in (("sm_90", "gfx942"), ("sm_80", "sm_100"))
    ]
    table = []
    for process in processes:
        out, errors = process.communicate(timeout=900)
        print(out)
        assert process.returncode in (0, 1), errors
        header, *rows = [line.split("\t") for line in out.splitlines()]
        table += [dict(zip(header, row, strict=True)) for row in rows]
    assert {row["kernel"] for row in table} == kernels()
    assert {row["target"] for row in table} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    in_memory = [row for row in table if int(row["local"]) or int(row["spills"])]
    assert not in_memory
    assert not [row for row in table if row["disorder"]]
    # Otherwise there was no release that the reader of the assembly knows, and it had seen nothing.
    arriving = {row["kernel"] for row in table if row["releases"] != "0"}
    assert arriving == {"sample_kernel", "draw_kernel", "truncate_kernel", "attend_kernel"}
    assert not [row for row in table if row["kernel"] in arriving and row["releases"] == "0"]
