"""Costs of a compiled kernel, read from its machine code: SASS of NVIDIA, amdgcn of AMD."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from fusedstep.bench.kernels.absent_gpu import Chip

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The bytes that a thread loads; SASS names 64 and 128 bits, and 8 and 16 (``.U8``, ``.S16``).
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "ubyte": 1}
PRODUCTS = ("HMMA", "QMMA", "HGMMA", "DMMA", "IMMA", "v_mfma")
LINE = re.compile(
    r"^\s*(?:(?P<label>\.L\w+):"  # of either
    r"|/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?\w+\s+)?(?P<sass>[A-Z][^;]*?)\s*;"
    r"|(?P<amd>[a-z]+_\w+.*?)\s*(?:;.*)?$)"
)


@dataclass(frozen=True)
class Usage:
    """Resources of a compiled kernel, in bytes but for the registers."""

    registers: int
    shared: int
    local: int  # what a thread keeps in memory: its stack and its spilled registers
    spills: int = 0  # vector registers of AMD; NVIDIA's are part of ``local``
    scalar_spills: int = 0  # AMD's scalar registers, which go to lanes of vector registers


@dataclass(frozen=True)
class Code:
    """Counts of instructions, in the order of their addresses.

    A *main load* is a load from global memory into shared memory (``cp.async``); in a kernel
    without any, one of the widest loads from global memory. A *loop* is innermost and loads from
    global memory or multiplies matrices; the *main loop* is the largest with matrix products, in a
    kernel without any the largest.
    """

    size: int  # instructions in all
    load_bytes: int  # per thread and main load
    loads_before: int  # from global memory, before the first main load
    barriers_before: int  # of a program's threads, before the first main load
    before_load: int  # instructions before the first main load
    before_arrival: int  # instructions before the first atomic; 0: none
    noise_path: int  # instructions on the shortest path to an atomic by way of noise; 0: none
    main_loop: int  # instructions; 0: none
    other_loops: int  # instructions of all other loops


def usage_of(compiled: Any) -> Usage:
    """Read from what the assembler wrote."""
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]

        def read(name: str) -> int:
            return sum(map(int, re.findall(rf"^\s*\.{name}:\s+(\d+)", text, re.MULTILINE)))

        return Usage(
            read("vgpr_count"),
            compiled.metadata.shared,
            read("private_segment_fixed_size"),
            read("vgpr_spill_count"),
            read("sgpr_spill_count"),
        )
    text = _tool(compiled, "cuobjdump", "-res-usage")
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    return Usage(found["REG"], compiled.metadata.shared, found["STACK"] + found["LOCAL"])


def code_of(compiled: Any) -> Code:
    """Counted in the disassembly."""
    if "cubin" in compiled.asm:
        return count(_tool(compiled, "nvdisasm", "-c", "-ndf"))
    return count(compiled.asm["amdgcn"].partition(".Lfunc_end")[0])


def occupancy(chip: Chip, compiled: Any, usage: Usage) -> int:
    """Programs that share an SM."""
    return chip.programs_per_sm(compiled.metadata.num_warps, usage.registers, usage.shared)


def count(text: str) -> Code:
    """Of a disassembly: labels and one instruction a line."""
    code: list[str] = []
    labels: dict[str, int] = {}
    predicated = set()
    for line in text.splitlines():
        found = LINE.match(line)
        if found is None:
            continue
        if found["label"]:
            labels[found["label"]] = len(code)
        else:
            if found["predicate"]:
                predicated.add(len(code))
            code.append(found["sass"] or found["amd"])
    while code and code[-1].startswith(("NOP", "BRA")):  # padding after the end
        code.pop()
    loads = [(at, width) for at, line in enumerate(code) if (width := _loaded(line))]
    copies = [(at, width) for at, width in loads if code[at].startswith("LDGSTS")]
    widest = max((width for _, width in copies or loads), default=0)
    main = [at for at, width in copies or loads if width == widest]
    first = main[0] if main else len(code)
    loops = [
        (any(line.startswith(PRODUCTS) for line in loop), len(loop))
        for loop in _inner_loops(code, labels)
        if any(_loaded(line) or line.startswith(PRODUCTS) for line in loop)
    ]
    main_loop = max(loops, default=(False, 0))[1]
    atomics = [at for at, line in enumerate(code) if _is_atomic(line)]
    return Code(
        size=len(code),
        load_bytes=widest,
        loads_before=sum(at < first for at, _ in loads),
        barriers_before=sum(line.startswith(("BAR.", "s_barrier")) for line in code[:first]),
        before_load=first,
        before_arrival=atomics[0] if atomics else 0,
        noise_path=_noise_path(code, labels, predicated),
        main_loop=main_loop,
        other_loops=sum(size for _, size in loops) - main_loop,
    )


def _inner_loops(code: list[str], labels: dict[str, int]) -> list[list[str]]:
    """The instructions of each innermost loop: from a label to a branch back to it."""
    spans = []
    for at, line in enumerate(code):
        if line.startswith(("BRA", "s_cbranch", "s_branch")):
            target = re.search(r"\.L\w+", line)
            if target and labels.get(target[0], at + 1) <= at:
                spans.append((labels[target[0]], at + 1))
    return [
        code[start:stop]
        for start, stop in spans
        if not any((a, b) != (start, stop) and start <= a and b <= stop for a, b in spans)
    ]


def _noise_path(code: list[str], labels: dict[str, int], predicated: set[int]) -> int:
    """Breadth first over instructions, each with and without a logarithm of base 2 before it."""
    steps = {(0, False): 0}
    queue = deque(steps)
    while queue:
        at, is_noisy = queue.popleft()
        line, count = code[at], steps[at, is_noisy]
        if is_noisy and _is_atomic(line):
            return count
        ends = line.startswith(("EXIT", "RET", "s_endpgm"))
        branches = line.startswith(("BRA", "s_cbranch", "s_branch"))
        conditional = at in predicated or "cbranch" in line or "UP" in line.partition("`")[0]
        following = [at + 1] if conditional or not (ends or branches) else []
        if branches and (target := re.search(r"\.L\w+", line)):
            following.append(labels[target[0]])
        is_noisy = is_noisy or line.startswith(("MUFU.LG2", "v_log_f32"))
        for state in ((index, is_noisy) for index in following if index < len(code)):
            if state not in steps:
                steps[state] = count + 1
                queue.append(state)
    return 0


def _loaded(line: str) -> int:
    """Bytes that a thread loads from global memory; 0 if the instruction loads none."""
    operation = line.split(None, 1)[0]
    if operation.startswith(("LDG.", "LDGSTS")):
        parts = operation.split(".")
        return next((WIDTHS[part] for part in parts if part in WIDTHS), 4)
    amd = re.match(r"(?:global|buffer|flat)_load_(?:lds_)?(\w+?)(?:_d16\w*)?$", operation)
    return AMD_WIDTHS.get(amd[1].removeprefix("s").replace("byte", "ubyte"), 0) if amd else 0


def _is_atomic(line: str) -> bool:
    return line.startswith(("ATOM", "RED.", "REDG", "global_atomic", "buffer_atomic"))


def _tool(compiled: Any, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
