"""The costs of kernels by their machine code, without a GPU: ours beside vLLM's own.

All are compiled as they would be launched, and the instructions are counted (``machine_code.py``).
The times of ``attention_us`` are a model that nobody has calibrated on a GPU: it is good for
telling which of two versions of a kernel is likely to be the faster, and why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusedstep.bench.kernels import attention as attention_bench
from fusedstep.bench.kernels import step as step_bench
from fusedstep.bench.progress import NO_PROGRESS, Progress
from fusedstep.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from fusedstep.bench.kernels.absent_gpu import AbsentGpu, Chip
    from fusedstep.bench.kernels.machine_code import Code

VOCAB_SIZE = 151936
STEP_CASES = step_bench.CASES[:-1]  # the last has other logits, but no other kernels
# Assumptions of the time model, none of them measured.
LAUNCH_US = 1.0
TRIP_US = 0.6  # a load that the next instruction waits for
TRIPS = 4  # before the first keys: lengths, the row, its block numbers, the keys
CYCLES = 4  # of a warp from one instruction to the next
PATH = 0.25  # of the instructions outside of loops and after the first load, what one piece takes


@dataclass(frozen=True)
class Row:
    """A kernel of one side in one case, as it is compiled for the target."""

    case: str
    side: str  # stock or fusedstep
    kernel: str
    registers: int
    local: int  # bytes of a thread in memory
    shared: int
    programs_per_sm: int
    load_bytes: int
    loads_before: int
    barriers_before: int
    main_loop: int
    size: int
    per_64_tokens: float | None  # instructions of a warp in the main loop, of attention


@dataclass(frozen=True)
class Time:
    """The model's time of one layer's attention, in microseconds."""

    case: str
    batch_size: int
    context: int
    floor_us: float
    fusedstep_us: float


@dataclass(frozen=True)
class Result:
    target: str
    triton: str
    rows: list[Row]
    times: list[Time]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def attention_us(
    chip: Chip,
    code: Code,
    case: attention_bench.Case,
    batch_size: int,
    context: int,
    shape: Mapping[str, Any],  # the kernel's constants
) -> float:
    """One layer's decode attention by ``attend_kernel``, bf16; see the assumptions above."""
    limits = chip.limits
    tile: int = shape["TILE"]
    cycle_us = CYCLES / (1e3 * chip.ghz)
    pieces = -(-context // tile)  # tiles of an item
    tiles = batch_size * case.num_kv_heads * pieces
    share: int = max(-(-tiles // limits.num_programs), shape["MIN_TILES"])
    programs = -(-tiles // share)
    tile_bytes = tile * 2 * case.head_size * 2
    loads_us = min(programs, tiles) * tile_bytes / chip.gb_per_s / 1e3
    body_us = min(share, tiles) * max(loads_us, code.main_loop * cycle_us)
    rest = code.size - code.before_load - code.main_loop - code.other_loops
    start_us = LAUNCH_US + TRIPS * TRIP_US + (code.before_load + PATH * rest) * cycle_us
    queries = case.num_heads // case.num_kv_heads
    # A round of a merge waits for CHUNK pieces of CHUNK_M queries.
    rounds: int = -(-pieces // share // shape["CHUNK"]) * -(-queries // shape["CHUNK_M"])
    merge_us = (rounds + 1) * TRIP_US if pieces > share else 0.0
    return start_us + body_us + merge_us


def pick_cases(
    names: tuple[str, ...],
) -> tuple[tuple[attention_bench.Case, ...], tuple[step_bench.Case, ...]]:
    """The cases of these names, all without names; ConfigError for an unknown one."""
    attention = {case.name: case for case in attention_bench.CASES}
    step = {case.name: case for case in STEP_CASES}
    for name in names:
        if name not in attention | step:
            raise ConfigError(f"--static: no case {name!r}: use {', '.join(attention | step)}")
    chosen = names or (*attention, *step)
    return (
        tuple(case for name, case in attention.items() if name in chosen),
        tuple(case for name, case in step.items() if name in chosen),
    )


def check_compiler(target: str) -> None:
    """Raise UnsupportedError unless Triton can compile for ``target`` and its tools can read it."""
    found = find_spec("triton")
    if found is None or found.origin is None:
        raise UnsupportedError("--static: Triton is not installed, and it compiles the kernels")
    backends = Path(found.origin).parent / "backends"
    needed = ["amd/compiler.py"]
    if target.startswith("sm_"):
        needed = [f"nvidia/bin/{tool}" for tool in ("ptxas", "cuobjdump", "nvdisasm")]
    for name in needed:
        if not (backends / name).exists():
            raise UnsupportedError(f"--static {target}: this Triton has no {name}")


@torch.inference_mode()
def measure(
    target: str,
    cases: tuple[str, ...],  # names
    batch_sizes: tuple[int, ...],
    contexts: tuple[int, ...],
    progress: Progress = NO_PROGRESS,
) -> Result:
    """Compile both sides' kernels for ``target`` and count. In a process that runs no kernel."""
    attention_cases, step_cases = pick_cases(cases)
    check_compiler(target)
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    from fusedstep.bench.kernels import absent_gpu, machine_code

    driver = absent_gpu.install()
    driver.chip = target
    chip = absent_gpu.CHIPS[target]
    _show_vllm_a_gpu(chip)
    result = Result(target, triton.__version__, [], [])
    for case, batch_size in product(attention_cases, batch_sizes):
        progress.say(f"attention, {case.name}, batch {batch_size}")
        decode = _decode(case, batch_size)
        compiled, shape = _attend(driver, decode)
        result.rows.extend(_attention_rows(driver, decode, compiled, shape["TILE"]))
        code = machine_code.code_of(compiled)
        for context in contexts:
            moved = case.moved_bytes(batch_size, context, torch.bfloat16)
            floor_us = moved / chip.gb_per_s / 1e3
            expected_us = attention_us(chip, code, case, batch_size, context, shape)
            result.times.append(Time(case.name, batch_size, context, floor_us, expected_us))
    for step in step_cases:
        progress.say(f"step, {step.name}, batch {max(batch_sizes)}")
        result.rows.extend(_step_rows(driver, step, max(batch_sizes)))
    return result


def _decode(case: attention_bench.Case, batch_size: int) -> attention_bench.Decode:
    device = torch.device("cpu")
    plan = attention_bench.Plan(device, (case,), (batch_size,), (64,), torch.bfloat16, 2)
    return attention_bench.Decode(plan, case, batch_size, 64)


def _attend(
    driver: AbsentGpu, decode: attention_bench.Decode
) -> tuple[Any, dict[str, Any]]:  # compiled, and its constants
    from fusedstep.bench.kernels import absent_gpu
    from fusedstep.ops.attention import AttentionLayer, DecodeAttention

    case, rows, device = decode.case, len(decode.seq_lens), torch.device("cpu")
    layer = AttentionLayer(case.num_heads, case.num_kv_heads, case.head_size, case.head_size**-0.5)
    attention = DecodeAttention([layer], rows, device, absent_gpu.CHIPS[driver.chip].limits)
    launch = attention.launch(
        layer,
        decode.query,
        decode.key,
        decode.value,
        decode.caches(torch.bfloat16)[0],
        decode.output,
        decode.block_table,
        decode.seq_lens,
        decode.slots,
        decode.starts,
        1,
    )
    return absent_gpu.compiled(driver, driver.chip, launch), launch.constexprs


def _attention_rows(
    driver: AbsentGpu, decode: attention_bench.Decode, compiled: Any, tile: int
) -> Iterator[Row]:
    name = f"{decode.case.name} n={len(decode.seq_lens)}"
    yield _row(driver, name, "fusedstep", "attend_kernel", compiled, tile)
    with _launches() as launched:
        decode.triton()(decode.caches(torch.bfloat16)[0])
    for kernel_name, options, found in launched:
        stock_tile = options["TILE_SIZE"] if kernel_name.startswith("kernel_") else None
        yield _row(driver, name, "stock", kernel_name, found, stock_tile)


def _step_rows(driver: AbsentGpu, case: step_bench.Case, batch_size: int) -> Iterator[Row]:
    from fusedstep.bench.kernels import absent_gpu
    from fusedstep.bench.kernels.step_state import build_state
    from fusedstep.ops.launch import Launch
    from fusedstep.ops.triton_step import TritonStep
    from fusedstep.vllm_plugin.runner.truncation import truncate_as_stock

    name = f"{case.name} n={batch_size}"
    state = build_state(case.params, batch_size, VOCAB_SIZE, 2, torch.device("cpu"))
    logits = torch.zeros(batch_size, VOCAB_SIZE, dtype=torch.bfloat16)
    ours = TritonStep(state, truncation=truncate_as_stock)
    for launch in ours.launches(logits, state.rows, batch_size, case.needs, advance=True):
        if isinstance(launch, Launch):
            kernel = absent_gpu.compiled(driver, driver.chip, launch)
            yield _row(driver, name, "fusedstep", launch.kernel.__name__, kernel, None)
            continue
        with _launches() as launched:  # stock's function, between two kernels of ours
            launch()
        for kernel_name, _, compiled in launched:
            yield _row(driver, name, "fusedstep", kernel_name, compiled, None)
    with _launches() as launched:
        stock = step_bench.stock_vllm().StockStep(*state.for_stock(), case.params)
        del launched[:]
        stock.step(logits)
    for kernel_name, _, compiled in launched:
        yield _row(driver, name, "stock", kernel_name, compiled, None)


def _row(
    driver: AbsentGpu, case: str, side: str, kernel: str, compiled: Any, tile: int | None
) -> Row:
    from fusedstep.bench.kernels import machine_code
    from fusedstep.bench.kernels.absent_gpu import CHIPS

    usage, code = machine_code.usage_of(compiled), machine_code.code_of(compiled)
    return Row(
        case=case,
        side=side,
        kernel=kernel,
        registers=usage.registers,
        local=usage.local + 4 * usage.spills,
        shared=usage.shared,
        programs_per_sm=machine_code.occupancy(CHIPS[driver.chip], compiled, usage),
        load_bytes=code.load_bytes,
        loads_before=code.loads_before,
        barriers_before=code.barriers_before,
        main_loop=code.main_loop,
        size=code.size,
        per_64_tokens=code.main_loop * 64 / tile if tile else None,
    )


@contextmanager
def _launches() -> Iterator[list[tuple[str, dict[str, Any], Any]]]:
    """Kernels launched meanwhile, with their options: they are compiled instead."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    launched: list[tuple[str, dict[str, Any], Any]] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launched.append((self.__name__, options, compiled))
        return compiled

    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run


def _show_vllm_a_gpu(chip: Chip) -> None:
    """Let vLLM import its Triton kernels, and choose as on ``chip``; all of it in this process."""
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend

    from fusedstep.bench.kernels.absent_gpu import AbsentGpu

    # vLLM's CPU build asks for a backend of this name; on a GPU a driver is active.
    absent = "cpu" not in backends
    if absent:
        backends["cpu"] = Backend(compiler=BaseBackend, driver=AbsentGpu)
    try:
        step_bench.stock_vllm()
        from vllm import triton_utils

        if not triton_utils.HAS_TRITON:
            raise UnsupportedError("--static: this vLLM does not use Triton here")
    finally:
        if absent:
            del backends["cpu"]  # it compiles nothing
    capability = (int(chip.target.arch) // 10, 0) if not chip.is_hip else (9, 4)
    torch.cuda.get_device_capability = lambda *_: capability
