"""The question at the end of a WHILE loop's body assembles for GPUs that are not here."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from fusedstep.kernels.condition import PTX

ASSEMBLERS = {"sm_80": "ptxas", "sm_90": "ptxas", "sm_100": "ptxas-blackwell"}


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this platform")
@pytest.mark.parametrize("target", ASSEMBLERS)
def test_assembles_without_a_stack(target: str, tmp_path: Path) -> None:
    """With Triton's assembler, which knows the device function that only the driver has."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / ASSEMBLERS[target]
    source = tmp_path / "condition.ptx"
    source.write_text(PTX)
    if not assembler.exists():
        assembler = tools / "ptxas"
    command = [assembler, "-v", "-arch", target, "-o", tmp_path / "condition.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stderr)
    assert done.returncode == 0, done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr
