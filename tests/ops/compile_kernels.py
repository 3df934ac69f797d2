"""Compiles what TritonStep and DecodeAttention launch, for GPUs that need not be there.

    cd tests && python -m ops.compile_kernels sm_90 sm_80 sm_100 gfx942

With --only, but for sm_90, only those that stdin names: kernel, target and case, TAB separated.
A process of its own, because Triton compiles nothing where its interpreter is switched on. Prints
one line per compiled kernel, TAB separated, as ``kernel_table.py`` keeps them; the exit code is 1
if one's accesses are not in order (``races/compiled.py``), and stderr says which.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import triton
from ops.attention_world import FP8, Rows, make_layer, make_rows
from ops.grammar_world import build_grammar
from ops.kernel_table import COLUMNS
from ops.world import DTYPES, World, build_world, strided
from races.compiled import order_of

from fusedstep.bench.kernels import absent_gpu, machine_code
from fusedstep.bench.kernels.absent_gpu import CHIPS
from fusedstep.ops.attention import AttentionLayer, DecodeAttention
from fusedstep.ops.launch import Launch
from fusedstep.ops.rotation import rotate_launch
from fusedstep.ops.triton_step import TritonStep
from fusedstep.ops.types import BatchNeeds, RowTokens, TokenInputs

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


@dataclass(frozen=True)
class Case:
    """One launch and what it is for."""

    name: str
    launch: Launch
    targets: tuple[str, ...] = tuple(CHIPS)


def cases(world: World, targets: Collection[str]) -> Iterator[Case]:
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
                sample, _, draw, *_ = stock.launches(logits, rows, num_reqs, needs, advance)
                yield Case(f"{call} {name} {where} for stock's truncation", sample)
                yield Case(f"{call} {name} {where} after stock's truncation", draw)
        for launch in step.constrain_launches(logits, rows, num_reqs):
            yield Case(f"constrain {where}", launch)
    for launch in step.follow_launches(rows, 64, ends_rows=True):
        yield Case("follow", launch)
    for num_reqs in (1, 64):
        tokens = torch.zeros(num_reqs, 4, dtype=torch.int64)
        counts = torch.zeros(num_reqs, dtype=torch.int32)
        for launch in step.accept_launches(tokens, counts, rows, num_reqs):
            yield Case(f"accept n={num_reqs}", launch)
    out = TokenInputs.allocate(64, 1024, len(world.block_tables))
    for num_reqs, width in ((1, 1), (64, 4), (64, 5)):
        drafts, back = torch.zeros(num_reqs, 3, dtype=torch.int64), None
        if width == 5:
            back = torch.zeros(num_reqs, dtype=torch.int32)
        tokens = RowTokens(width, drafts, 3, back=back)
        for launch in step.place_launches(rows, num_reqs, out, tokens):
            yield Case(f"place n={num_reqs} width={width}", launch)
    unaligned = strided(torch.zeros(1, VOCAB_SIZE, dtype=torch.bfloat16), VOCAB_SIZE + 3, 1)
    for launch in step.launches(unaligned, rows, 1, EVERYTHING, True):
        yield Case("step everything bfloat16 n=1 unaligned", launch)
    yield from attention_cases(targets)
    yield from rotation_cases()


def attention_cases(targets: Collection[str]) -> Iterator[Case]:
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
        # Qwen3-0.6B, Llama-8B, SmolLM2-135M; a part of a head; without tensor cores.
        (16, 8, 128, 1, bf16, {"rotary": 128, "norm": True, "rows": 64}),
        (16, 8, 128, 4, bf16, {"rotary": 128, "norm": True, "rounded": True}),
        (32, 8, 128, 1, bf16, {"rotary": 128}),
        (9, 3, 64, 1, bf16, {"rotary": 64}),
        (32, 8, 96, 2, bf16, {"rotary": 48, "norm": True}),
        (32, 8, 128, 1, fp32, {"rotary": 128, "norm": True}),
        (32, 8, 128, 1, bf16, {"rotary": 128, "norm": True, "fp8": True}),
        *((32, 8, size, length, bf16, {"fp8": True}) for size, length in ((128, 1), (256, 4))),
        *(
            (heads, 8, size, 1, bf16, {"rows": num_rows})
            for heads, size, num_rows in (
                (16, 128, 64),
                (32, 128, 64),
                (32, 64, 256),
                (32, 128, 1024),
            )
        ),
    ]
    for target in targets:
        chip = CHIPS[target]
        for heads, kv_heads, size, length, dtype, options in shapes:
            fp8 = bool(options.get("fp8"))
            if fp8 and target not in FP8_CACHES:
                continue
            where = f"{heads}/{kv_heads} heads of {size} q={length} {str(dtype)[6:]} {options}"
            features = {name: value for name, value in options.items() if name != "rows"}
            if "rotary" in features:
                features |= {"dtype": dtype, "positions": 40960}
            layer = make_layer(heads, kv_heads, size, **features)
            rows = make_rows(layer, [12, 13, 14, 15], query_len=length, dtype=dtype)
            if "rows" in options:
                rows = as_in_vllm(layer, rows, options["rows"])
            if fp8:
                rows = replace(rows, kv_cache=rows.kv_cache.to(FP8_CACHES[target]))
            num_rows = len(rows.seq_lens)
            attention = DecodeAttention([layer], num_rows, torch.device("cpu"), chip.limits)
            launch = attention.launch(layer, *rows.arguments())
            yield Case(f"attention {where}", launch, (target,))


def rotation_cases() -> Iterator[Case]:
    """Of a prefill: Qwen3's heads, SmolLM2's, a part of a head."""
    for heads, kv_heads, size, options in (
        (16, 8, 128, {"rotary": 128, "norm": True}),
        (16, 8, 128, {"rotary": 128, "norm": True, "rounded": True}),
        (9, 3, 64, {"rotary": 64}),
        (32, 8, 96, {"rotary": 48, "norm": True}),
    ):
        for num_rows in (4, 1024):
            layer = make_layer(heads, kv_heads, size, **options, dtype=torch.bfloat16)
            rows = make_rows(layer, [12, 13, 14, 15], dtype=torch.bfloat16)
            rows = as_in_vllm(layer, rows, num_rows)
            assert layer.rotation is not None
            rotated = rows.output, torch.empty_like(rows.key)
            tensors = (rows.query, rows.key, rows.seq_lens, rows.starts, *rotated)
            launch = rotate_launch(layer.rotation, *tensors)
            yield Case(f"rotate {heads}/{kv_heads} heads of {size} n={num_rows} {options}", launch)


def as_in_vllm(layer: AttentionLayer, rows: Rows, num_rows: int) -> Rows:
    """One token a row, slices of one qkv projection; block tables for 40960 tokens."""
    heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    tokens = torch.zeros(num_rows, sum(heads) * layer.head_size, dtype=rows.query.dtype)
    parts = tokens.split([n * layer.head_size for n in heads], dim=1)
    query, key, value = (
        part.view(num_rows, n, layer.head_size) for part, n in zip(parts, heads, strict=True)
    )
    return replace(
        rows,
        query=query,
        key=key,
        value=value,
        output=torch.zeros(query.shape, dtype=query.dtype),
        block_table=torch.zeros(num_rows, 40960 // 16, dtype=torch.int32),
        seq_lens=torch.zeros(num_rows, dtype=torch.int32),
        slots=torch.zeros(num_rows, dtype=torch.int64),
        starts=torch.arange(num_rows + 1, dtype=torch.int32),
    )


def numbers_of(target: str, compiled: Any, releases: int) -> list[int]:
    """Of a line of the table."""
    usage, code = machine_code.usage_of(compiled), machine_code.code_of(compiled)
    return [
        usage.registers,
        usage.local,
        usage.spills,
        usage.scalar_spills,
        usage.shared,
        machine_code.occupancy(CHIPS[target], compiled, usage),
        code.load_bytes,
        code.loads_before,
        code.barriers_before,
        releases,
        code.before_arrival,
        code.noise_path,
        code.main_loop,
        code.other_loops,
        code.size,
    ]


def main(targets: list[str], only: Collection[tuple[str, ...]] | None = None) -> int:
    """Compile as the JIT would, without a launch."""
    assert "vllm" not in sys.modules
    start = time.perf_counter()
    driver = absent_gpu.install()
    world = build_world(
        VOCAB_SIZE, 64, max_num_reqs=64, block_sizes=(16, 16), sliding_reach=(1023, 0)
    )
    world = replace(world, grammar=build_grammar(64, VOCAB_SIZE))
    seen, is_bad = set(), False
    print(*COLUMNS, sep="\t")
    for case in cases(world, targets):
        for target in (name for name in targets if name in case.targets):
            name = (case.launch.kernel.__name__, target, case.name)
            if only is not None and target != "sm_90" and name not in only:
                continue
            compiled = absent_gpu.compiled(driver, target, case.launch)
            if compiled.hash in seen:
                continue
            seen.add(compiled.hash)
            order = order_of(compiled.asm["amdgcn" if CHIPS[target].is_hip else "ptx"])
            print(*name, *numbers_of(target, compiled, order.releases), sep="\t", flush=True)
            for disorder in order.disorders:
                print(*name, disorder, file=sys.stderr)
                is_bad = True
    seconds = time.perf_counter() - start
    print(f"{len(seen)} kernels, Triton {triton.__version__}, {seconds:.0f} s", file=sys.stderr)
    return int(is_bad)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == "--only":
        sys.exit(main(arguments[1:], {tuple(line.rstrip("\n").split("\t")) for line in sys.stdin}))
    sys.exit(main(arguments))
