"""Compiles what TritonStep and DecodeAttention launch, for GPUs that need not be there.

    cd tests && python -m ops.compile_kernels sm_90 sm_80 sm_100 gfx942

A process of its own, because Triton compiles nothing where its interpreter is switched on. Prints
one line per compiled kernel, TAB separated; the exit code is 1 if one of them keeps anything of its
threads in memory or its accesses are not in order (``races/compiled.py``).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from ops.attention_world import FP8, make_layer, make_rows
from ops.world import DTYPES, World, build_world, strided
from races.compiled import order_of
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from fusedstep.ops.attention import DecodeAttention, DeviceLimits
from fusedstep.ops.launch import Launch
from fusedstep.ops.triton_step import TritonStep
from fusedstep.ops.types import BatchNeeds

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = tuple(name for name, target in TARGETS.items() if target.backend == "cuda")
# What torch would say of these devices: compute units, and shared memory of a program in bytes.
LIMITS = {
    "sm_90": DeviceLimits(132, (228 << 10) // 2 - 1024),
    "sm_80": DeviceLimits(108, (164 << 10) // 2 - 1024),
    "sm_100": DeviceLimits(148, (228 << 10) // 2 - 1024),
    "gfx942": DeviceLimits(304, 64 << 10, is_hip=True),
}
FP8_CACHES = {"sm_90": FP8, "sm_100": FP8, "gfx942": torch.float8_e4m3fnuz}
VOCAB_SIZE = 151936
PLAIN = BatchNeeds(adjustment=False, min_p=False, truncation=False, logprobs=False)
EVERYTHING = BatchNeeds(adjustment=True, min_p=True, truncation=True, logprobs=True)
NEEDS = {
    "plain": PLAIN,
    "adjustment": replace(PLAIN, adjustment=True),
    "min_p": replace(PLAIN, min_p=True),
    "truncation": replace(PLAIN, truncation=True),
    "logprobs": replace(PLAIN, logprobs=True),
    "everything": EVERYTHING,
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
COLUMNS = (
    "kernel",
    "target",
    "registers",
    "shared",
    "local",
    "spills",
    "scalar spills",
    "releases",
    "disorder",
    "for",
)


class AbsentDevice(DriverBase):  # type: ignore[misc]
    """What the JIT asks of a driver before it compiles; a device's number is its target's name."""

    target = "sm_90"

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise AssertionError("nothing is launched or timed here")

    def get_benchmarker(self) -> Any:
        raise AssertionError("nothing is launched or timed here")


@dataclass(frozen=True)
class Usage:
    """Resources of a compiled kernel, in bytes but for the registers."""

    registers: int
    shared: int
    local: int  # what a thread keeps in memory: its stack and its spilled registers
    spills: int = 0  # vector registers of AMD; NVIDIA's are part of ``local``
    scalar_spills: int = 0  # AMD's scalar registers, which go to lanes of vector registers


@dataclass(frozen=True)
class Case:
    """One launch and what it is for."""

    name: str
    launch: Launch
    targets: tuple[str, ...] = tuple(TARGETS)


def cases(world: World) -> Iterator[Case]:
    """All launches of a step and around it."""
    step, rows = world.bind(TritonStep), world.rows
    stock = TritonStep(world, truncation=lambda *_: None)  # as on a GPU
    for num_reqs in (1, 2, 64):
        for launch in step.prepare_launches(rows, num_reqs):
            yield Case(f"prepare n={num_reqs}", launch)
    for dtype, num_reqs in product(DTYPES, (1, 64)):
        logits = torch.zeros(num_reqs, VOCAB_SIZE, dtype=dtype)
        where = f"{str(dtype).removeprefix('torch.')} n={num_reqs}"
        for (name, needs), advance in product(NEEDS.items(), (True, False)):
            call = "step" if advance else "sample"
            for launch in step.launches(logits, rows, num_reqs, needs, advance):
                yield Case(f"{call} {name} {where}", launch)
            if needs.truncation:
                sample, _, draw = stock.launches(logits, rows, num_reqs, needs, advance)
                yield Case(f"{call} {name} {where} for stock's truncation", sample)
                yield Case(f"{call} {name} {where} after stock's truncation", draw)
        token_ids = torch.zeros(num_reqs, 5, dtype=torch.int64)
        logprobs = torch.zeros(num_reqs, 5)
        for launch in step.logprobs_launches(logits, token_ids, logprobs):
            yield Case(f"token_logprobs {where}", launch)
    unaligned = strided(torch.zeros(1, VOCAB_SIZE, dtype=torch.bfloat16), VOCAB_SIZE + 3, 1)
    for launch in step.launches(unaligned, rows, 1, EVERYTHING, True):
        yield Case("step everything bfloat16 n=1 unaligned", launch)
    yield from attention_cases()


def attention_cases() -> Iterator[Case]:
    """Head sizes, groups, query lengths and dtypes; then each feature by itself."""
    bf16, fp16, fp32 = DTYPES
    shapes = [
        *((16, 8, size, 1, bf16, {}) for size in (64, 80, 96, 128, 192, 256)),
        *((32, 8, size, 1, fp32, {}) for size in (64, 128, 256)),
        *(
            (heads, 8, 128, length, bf16, {})
            for heads, length in ((8, 8), (32, 4), (32, 8), (64, 8))
        ),
        (32, 1, 256, 8, bf16, {}),
        (64, 8, 128, 8, fp32, {}),
        (32, 8, 64, 1, fp16, {"window": 128, "sinks": True}),
        (32, 8, 128, 1, bf16, {"alibi": True}),
        (16, 8, 256, 2, bf16, {"window": 1024, "soft_cap": 50.0}),
        *((32, 8, size, length, bf16, {"fp8": True}) for size, length in ((128, 1), (256, 4))),
    ]
    for target, limits in LIMITS.items():
        for heads, kv_heads, size, length, dtype, options in shapes:
            fp8 = bool(options.get("fp8"))
            if fp8 and target not in FP8_CACHES:
                continue
            layer = make_layer(heads, kv_heads, size, **options)
            rows = make_rows(layer, [64, 65, 66, 67], query_len=length, dtype=dtype)
            if fp8:
                rows = replace(rows, kv_cache=rows.kv_cache.to(FP8_CACHES[target]))
            attention = DecodeAttention([layer], 4, torch.device("cpu"), limits)
            launch = attention.launch(layer, *rows.arguments())
            where = f"{heads}/{kv_heads} heads of {size} q={length} {str(dtype)[6:]} {options}"
            yield Case(f"attention {where}", launch, (target,))


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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    return Usage(found["REG"], compiled.metadata.shared, found["STACK"] + found["LOCAL"])


def main(targets: list[str]) -> int:
    """Compile as the JIT would, without a launch."""
    assert "vllm" not in sys.modules
    start = time.perf_counter()
    device = AbsentDevice()
    triton.runtime.driver.set_active(device)
    world = build_world(VOCAB_SIZE, 64, max_num_reqs=64, block_sizes=(16, 16))
    seen, is_bad = set(), False
    print(*COLUMNS, sep="\t")
    for case in cases(world):
        launch = case.launch
        for target in (name for name in targets if name in case.targets):
            device.target = target
            nvidia = target in NVIDIA
            options = {
                name: number
                for name, number in launch.options.items()
                if nvidia or name != "maxnreg"
            }
            compiled = launch.kernel.warmup(
                **launch.args, **launch.constexprs, **options, grid=launch.grid
            )
            if compiled.hash in seen:
                continue
            seen.add(compiled.hash)
            usage = usage_of(compiled)
            assembly = compiled.asm["ptx" if nvidia else "amdgcn"]
            order = order_of(assembly)
            disorder = "; ".join(order.disorders)
            is_bad |= usage.local > 0 or usage.spills > 0 or disorder != ""
            found = (*vars(usage).values(), order.releases, disorder)
            print(launch.kernel.__name__, target, *found, case.name, sep="\t")
            sys.stdout.flush()
    seconds = time.perf_counter() - start
    print(f"{len(seen)} kernels, Triton {triton.__version__}, {seconds:.0f} s", file=sys.stderr)
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
