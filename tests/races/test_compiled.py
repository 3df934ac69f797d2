"""The reader of PTX and amdgcn sees faults in the memory order of kernels compiled with them.

That there are none in the kernels as they are is checked for every one that is shipped, by
``tests/ops/test_compile.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from races.compiled import order_of

TESTS = Path(__file__).resolve().parents[1]

# As Triton writes an arrival: one thread counts, the others get the count in shared memory.
PTX = """
.loc 1 98 5 // sample.py:98:5
@%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };
bar.sync 0;
.loc 1 57 5 // winner.py:57:5
@%p2 atom.global.gpu.acq_rel.add.u32 %r2, [ %rd2 + 0 ], 1;
@%p2 st.shared::cta.b32 [ %r3 + 0 ], %r2;
bar.sync 0;
ld.shared.b32 %r4, [global_smem];
setp.ne.b32 %p3, %r4, 3;
@%p3 bra $L__BB0_1;
.loc 1 78 5 // winner.py:78:5
ld.global.cg.b32 %r5, [ %rd1 + 0 ];
$L__BB0_1:
ret;
"""
AMDGCN = """
.amdgcn_target "amdgpu9.42-amd-amdhsa-unknown-gfx942"
.loc 1 98 5 ; sample.py:98:5
s_cbranch_execz .LBB0_1
global_store_dword v1, v0, s[4:5]
.LBB0_1:
s_waitcnt vmcnt(0) lgkmcnt(0)
s_barrier
.loc 1 57 5 ; winner.py:57:5
buffer_wbl2 sc1
s_waitcnt vmcnt(0)
global_atomic_add v1, v1, v2, s[4:5] sc0
s_waitcnt vmcnt(0)
buffer_inv sc1
s_barrier
.loc 1 78 5 ; winner.py:78:5
global_load_dword v1, v1, s[4:5]
s_endpgm
"""
LATE = "sample.py:98: no barrier before the release at winner.py:57"
IN_FLIGHT = "sample.py:98: not waited for at the barrier before the release at winner.py:57"
EARLY = "winner.py:78: load before the barrier after winner.py:57"


@pytest.mark.parametrize(
    ("assembly", "gone", "found"),
    [
        (PTX, "", []),
        (PTX, "bar.sync 0;\n.loc", [LATE]),
        (PTX, "bar.sync 0;\nld", [EARLY]),
        (AMDGCN, "", []),
        (AMDGCN, "s_barrier\n.loc 1 57", [LATE]),
        (AMDGCN, "s_barrier\n.loc 1 78", [EARLY]),
        (AMDGCN, "s_waitcnt vmcnt(0) lgkmcnt(0)\n", [IN_FLIGHT]),
        (AMDGCN, "vmcnt(0) lgkm", [IN_FLIGHT]),
        (AMDGCN, "s_waitcnt vmcnt(0)\nglobal", []),
    ],
)
def test_reads_assembly(assembly: str, gone: str, found: list[str]) -> None:
    """Without the first instruction of ``gone``; what follows it there only says which is meant."""
    assert gone in assembly
    first, *others = gone.split("\n")
    assert order_of(assembly.replace(gone, "\n".join(["", *others]))).disorders == found
    assert first in assembly


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this platform")
def test_sees_the_missing_wait() -> None:
    """A kernel of before the repair: every store before the arrival may be missed."""
    command = [sys.executable, "-W", "ignore", "-m", "races.compile_mutants"]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    found = {mutant: disorders for mutant, *disorders in rows}
    assert found.pop("none") == []
    (disorders,) = found.values()
    assert disorders
    assert all(re.match(r"(sample|winner)\.py:\d+: not waited for at", line) for line in disorders)
