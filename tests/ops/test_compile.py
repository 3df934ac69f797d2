"""What TritonStep launches compiles for GPUs that are not here, in their registers and in order."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="there is no Triton for this platform")
from ops import kernel_table
from ops.kernel_table import Table

from fusedstep.bench.kernels import machine_code

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


@pytest.fixture(scope="module")
def kept() -> Table:
    """The table of this Triton, as it is in the repository."""
    path = kernel_table.path()
    assert path.exists(), f"no table for this Triton: {kernel_table.RENEW}"
    return kernel_table.parse(path.read_text(encoding="utf-8").splitlines())


@pytest.fixture(scope="module")
def now(kept: Table) -> Table:
    """A part of it as it is now; ``python -m ops.kernel_table`` compiles all of it."""
    return kernel_table.compiled(kernel_table.of_ci(kept))


def test_kernels_compile_without_spills(kept: Table, now: Table) -> None:
    """Every specialisation on Ampere, Hopper, Blackwell and MI300."""
    assert {name[1] for name in now} == set(kernel_table.TARGETS)
    for table in (kept, now):
        assert {name[0] for name in table} == kernels()
        assert not [name for name, row in table.items() if row["local"] or row["spills"]]
    for target in kernel_table.TARGETS:
        assert {name[0] for name in kept if name[1] == target} == kernels()


def test_releases_are_seen(kept: Table) -> None:
    """Otherwise the reader of the assembly did not know them, and called no access disordered."""
    arriving = {name[0] for name, row in kept.items() if row["releases"]}
    assert arriving == {"sample_kernel", "draw_kernel", "truncate_kernel", "attend_kernel"}
    assert not [name for name, row in kept.items() if name[0] in arriving and not row["releases"]]


def test_every_kernel_costs_what_the_table_says(kept: Table, now: Table) -> None:
    """One line for each number that a change of ours, or of Triton's, has moved."""
    names = kernel_table.of_ci(kept)
    before = {name: row for name, row in kept.items() if name in names}
    changed = kernel_table.differences(before, now)
    if changed:
        pytest.fail("\n".join(changed), pytrace=False)


def test_noise_is_cheap(kept: Table) -> None:
    """At most 45 instructions a token from the start to arrival: 16 tokens a thread."""
    row = kept["sample_kernel", "sm_90", "step plain bfloat16 n=64"]
    assert 0 < row["noise path"] <= 45 * 16


def test_a_worse_number_is_named() -> None:
    name = ("attend_kernel", "sm_90", "heads of 128")
    numbers = dict.fromkeys(kernel_table.NUMBERS, 16)
    changes = {"registers": 17, "load bytes": 8, "size": 9, "programs per SM": 20}
    lines = kernel_table.differences({name: numbers}, {name: numbers | changes})
    assert lines == [
        f"{what} on sm_90 (heads of 128): {how}; if it is meant: {kernel_table.RENEW}"
        for what, how in (
            ("WORSE: attend_kernel", "registers 16 -> 17"),
            ("WORSE: attend_kernel", "load bytes 16 -> 8"),
            ("better: attend_kernel", "programs per SM 16 -> 20"),
            ("better: attend_kernel", "size 16 -> 9"),
        )
    ]
    assert kernel_table.differences({}, {name: numbers})[0].startswith(
        "attend_kernel on sm_90 (heads of 128): new"
    )


def test_the_table_is_read_as_written() -> None:
    table = {("a", "sm_80", "b"): dict.fromkeys(kernel_table.NUMBERS, 3)}
    assert kernel_table.parse(kernel_table.written(table).splitlines()) == table


SASS = """
.L_x_1:
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/              @P1  LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0030*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0034*/               @P2 BRA `(.L_x_4) ;
        /*0038*/                   MUFU.LG2 R4, R4 ;
.L_x_4:
        /*0040*/             @!P0  BRA `(.L_x_2) ;
        /*0050*/                   ATOMG.E.ADD.STRONG.GPU PT, R4, desc[UR4][R2.64], R5 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
        /*0090*/                   NOP ;
"""
AMDGCN = """
\tglobal_load_dword v1, v[2:3], off
\ts_barrier
.LBB0_1:                                ; =>This Inner Loop Header
\tglobal_load_dwordx4 v[4:7], v[2:3], off
\tv_add_u32_e32 v1, v2, v3             ; a comment
\ts_cbranch_vccnz .LBB0_1
\tglobal_atomic_add v1, v2, s[0:1]
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [(SASS, (10, 16, 1, 1, 2, 7, 7, 4, 0)), (AMDGCN, (6, 16, 1, 1, 2, 5, 0, 3, 0))],
)
def test_instructions_are_counted(text: str, expected: tuple[object, ...]) -> None:
    assert tuple(vars(machine_code.count(text)).values()) == expected


def test_code_goes_on_after_an_early_exit() -> None:
    early = "\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm\n"
    amdgcn = f"{early}{AMDGCN}\ts_endpgm\n.Lfunc_end0:\n\ts_nop 0\n"
    found = machine_code.code_of(SimpleNamespace(asm={"amdgcn": amdgcn}))
    assert (found.size, found.load_bytes, found.main_loop) == (9, 16, 3)
