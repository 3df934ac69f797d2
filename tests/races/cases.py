"""Launches of every kernel that there is, small: each case is all that a decode step launches.

The blocks are cut so that a few hundred tokens of vocabulary or context need several programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from ops.attention_world import make_layer, make_rows
from ops.compile_kernels import NEEDS
from ops.grammar_world import build_grammar
from ops.options import (
    COMBINATIONS,
    Option,
    allowed,
    bad_words,
    greedy,
    logit_bias,
    min_p,
    min_tokens,
    neutral,
    penalties,
    set_options,
    small_top_p,
    top_k_most,
    top_p,
    warm,
)
from ops.world import build_world, random_logits

from fusedstep.ops import attention, reference, triton_scratch, triton_step
from fusedstep.ops.attention import MAX_QUERY_LEN, DecodeAttention, DeviceLimits
from fusedstep.ops.rotation import rotate_launch
from fusedstep.ops.triton_step import TritonStep
from fusedstep.ops.types import OUTSIDE, REASONS, RowTokens, TokenInputs

VOCAB_SIZE = 500
BLOCK = 128  # of the vocabulary: four programs per row
CANDIDATES = 32

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """``run`` builds its tensors, launches, and returns what the launches have written."""

    name: str
    run: Callable[[], Tensors]

    def __str__(self) -> str:
        return self.name


@contextmanager
def small_blocks() -> Iterator[None]:
    """Kernels launched inside have several programs where the shipped sizes would need one."""
    with (
        patch.object(triton_step, "SAMPLE_BLOCKS", (BLOCK, BLOCK)),
        patch.object(triton_scratch, "SAMPLE_BLOCKS", (BLOCK, BLOCK)),
        patch.object(triton_step, "TRUNCATE_BLOCKS", (BLOCK, BLOCK)),
        patch.object(triton_step, "CONSTRAIN_BLOCK", BLOCK),
        patch.object(triton_step, "CANDIDATES", CANDIDATES),
        patch.object(triton_scratch, "CANDIDATES", CANDIDATES),
        patch.object(attention, "MIN_SHARE", 16),
    ):
        yield


def few(row: Any) -> None:
    """Fewer than the row has buckets: their maxima bound the candidates (see sample.py)."""
    row.top_k.clamp_(max=3)


# Options of the rows in a batch that needs no more than the key says (see BatchNeeds).
ROWS: dict[str, list[tuple[Option, ...]]] = {
    "plain": [(greedy,), (neutral,)],
    "adjustment": [
        (greedy, penalties, logit_bias, min_tokens, bad_words),
        (allowed, logit_bias, min_tokens, bad_words),
    ],
    "min_p": [(min_p,), (warm, min_p)],
    "truncation": [(warm, few, top_p), (small_top_p,), (top_k_most, top_p)],
    "logprobs": [(greedy,), (neutral,)],
    "everything": [
        (warm, min_p, few, small_top_p, penalties, logit_bias, min_tokens, bad_words),
        (warm, allowed, top_p, penalties, min_tokens),
        (min_p,),
    ],
}


def truncate(logits: torch.Tensor, limit_k: torch.Tensor, limit_p: torch.Tensor) -> None:
    """Somebody else's truncation (see ``ops.launch.Truncation``)."""
    for row, k, p in zip(logits, limit_k.tolist(), limit_p, strict=True):
        if k < len(row):
            row.copy_(reference.apply_top_k(row, k))
        if p < 1:
            row.copy_(reference.apply_top_p(row, p))


def step_case(
    kind: str,
    options: list[tuple[Option, ...]],
    *,
    advance: bool,
    dtype: torch.dtype = torch.bfloat16,
    block_sizes: tuple[int, ...] = (16,),
    seed: int = 0,
    hands_over: bool = False,
) -> Case:
    """``prepare`` and two steps: the second finds what the first has left.

    Row 1 is padding; each other row has one of the combinations of options.
    """

    def run() -> Tensors:
        n = len(options) + 1
        logits = [random_logits(n, VOCAB_SIZE, seed=seed + i, scale=3.0) for i in range(2)]
        world = build_world(VOCAB_SIZE, n, padding=(1,), seed=seed, block_sizes=block_sizes)
        rows = [row for row in range(n) if row != 1]
        for row, chosen in zip(rows, options, strict=True):
            set_options(world, row, chosen, logits[0])
        # The first and the last row stop in the second step, for different reasons.
        last = world.rows.idx_mapping[n - 1]
        world.rows.steps_allowed[0] = 2
        world.stop.max_len[last] = world.requests.total_len[last] + 2
        world.stop.num_stop_token_ids[:] = 2
        step = world.bind(partial(TritonStep, truncation=truncate if hands_over else None))
        step.prepare(world.rows, n)
        for step_logits in logits:
            call = step.step if advance else step.sample
            call(step_logits.to(dtype), world.rows, n, NEEDS[kind])
        return world.tensors() | {"arrivals": step._scratch.arrivals}

    over = "-handed-over" if hands_over else ""
    return Case(f"{'step' if advance else 'sample'}-{kind}{over}", run)


def grammar_case(*, block_sizes: tuple[int, ...] = (16,), seed: int = 0) -> Case:
    """Two steps under grammars: one row is padding, some end outside of the tables."""

    def run() -> Tensors:
        n = 6
        logits = [random_logits(n, VOCAB_SIZE, seed=seed + i) for i in range(2)]
        world = build_world(VOCAB_SIZE, n, padding=(1,), seed=seed, block_sizes=block_sizes)
        world = replace(world, grammar=build_grammar(n + 3, VOCAB_SIZE, seed=seed))
        assert world.grammar is not None
        reasons = world.rows.idx_mapping[2]
        world.grammar.states[reasons] = REASONS - 3
        world.grammar.reasoning_ends[reasons] = torch.tensor([7, 11])
        for row in (0, 3, 4):  # two end outside in one step
            world.grammar.states[world.rows.idx_mapping[row]] = row
            world.grammar.next_states[row] = OUTSIDE
        step = world.bind(TritonStep)
        step.prepare(world.rows, n)
        for each in logits:
            step.step(each, world.rows, n, replace(NEEDS["plain"], grammar=True))
        masked = {f"logits {i}": each for i, each in enumerate(logits)}
        return world.tensors() | masked | {"states": world.grammar.states}

    return Case(f"step-grammar-{len(block_sizes)}", run)


def accept_case(*, seed: int = 0) -> Case:
    """Two speculative rounds: some tokens come twice, two rows stop in one round."""

    def run() -> Tensors:
        n = 5
        generator = torch.Generator().manual_seed(seed)
        world = build_world(VOCAB_SIZE, n, padding=(1,), seed=seed)
        world.stop.max_len[:] = 90
        for row in (0, 3):
            req = world.rows.idx_mapping[row]
            world.stop.max_len[req] = world.requests.total_len[req] + 4
        world.stop.num_stop_token_ids[:] = 2
        step = world.bind(TritonStep)
        step.prepare(world.rows, n)
        counts = []
        for _ in range(2):
            tokens = torch.randint(0, 3, (n, 4), generator=generator)
            counts.append(torch.randint(2, 5, (n,), generator=generator).int())
            step.accept(tokens, counts[-1], world.rows, n)
        return world.tensors() | {f"counts {i}": each for i, each in enumerate(counts)}

    return Case("accept", run)


def place_case(*, seed: int = 0) -> Case:
    """What a round verifies, then what its drafter reads, in the same place."""

    def run() -> Tensors:
        n = 5
        world = build_world(VOCAB_SIZE, n, padding=(1,), seed=seed, block_sizes=(16, 32))
        step = world.bind(TritonStep)
        step.prepare(world.rows, n)
        drafts = torch.arange(3 * n).view(n, 3)
        back = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed)).int()
        out = TokenInputs.allocate(n + 2, 40, 2)
        step.place(world.rows, n, out, RowTokens(4, drafts, 3))
        step.place(world.rows, n, out, RowTokens(5, drafts, 0, back=back))
        step.place(world.rows, n, out, RowTokens(1, drafts, 2, ahead=2))
        return world.tensors() | {f"out {name}": t for name, t in vars(out).items()}

    return Case("place", run)


def attention_case(
    query_len: int,
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 16,
    dtype: torch.dtype = torch.float32,
    programs: int = 6,
    **options: Any,
) -> Case:
    """Two launches on one scratch; rows of one piece and of many, one that writes nowhere."""

    def run() -> Tensors:
        layer = make_layer(*heads, head_size, **options)
        lens = [query_len, query_len, max(query_len - 1, 1), 1, query_len]
        seq_lens = [70, query_len, 40, 33, 0]
        rows = make_rows(layer, seq_lens, query_len=lens, dtype=dtype)
        limits = DeviceLimits(programs // 2, 64 << 10)
        call = DecodeAttention([layer], len(lens), torch.device("cpu"), limits)
        other = replace(rows.copy(), query=1 - 0.5 * rows.query)
        for out in (other, rows):  # what a launch leaves is wrong for the next
            call(layer, *out.arguments())
        found = {"output": rows.output, "cache": rows.kv_cache.float()}
        return found | {"arrivals": call._scratch.arrivals}

    of = [] if head_size == 16 else [f"heads-of-{head_size}"]
    name = "-".join([f"attention-q{query_len}", *of, *(f"{k}={v}" for k, v in options.items())])
    return Case(name, run)


def rotation_case() -> Case:
    """Several blocks of heads, rows of none and tokens of no row."""

    def run() -> Tensors:
        layer = make_layer(4, 2, 64, rotary=32, norm=True)
        rows = make_rows(layer, [9, 0, 70, 30], query_len=[9, 0, 30, 2])
        rotated = torch.zeros_like(rows.query), torch.zeros_like(rows.key)
        assert layer.rotation is not None
        rotate_launch(
            layer.rotation, rows.query, rows.key, rows.seq_lens[:3], rows.starts[:4], *rotated
        )()
        return {"query": rotated[0], "key": rotated[1]}

    return Case("rotate", run)


ATTENTION_OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 40},
    {"sinks": True},
    {"alibi": True},
    {"soft_cap": 20.0},
    {"fp8": True},
    {"window": 20, "sinks": True},
    {"heads": (8, 1)},  # several blocks of queries per KV head
]


def cases() -> list[Case]:
    """Every kernel, every need of a batch, 1 to 8 new tokens: for CI."""
    return [
        *(step_case(kind, rows, advance=True) for kind, rows in ROWS.items()),
        step_case("everything", ROWS["everything"], advance=False, block_sizes=(16, 32)),
        grammar_case(block_sizes=(16, 32)),
        accept_case(),
        place_case(),
        step_case("truncation", ROWS["truncation"], advance=True, hands_over=True),
        step_case("everything", ROWS["everything"], advance=True, hands_over=True),
        *(
            attention_case(query_len, **ATTENTION_OPTIONS[query_len - 1])
            for query_len in range(1, MAX_QUERY_LEN + 1)
        ),
        attention_case(2, heads=(2, 1), head_size=256),  # in float32: loads in another order
        attention_case(1, dtype=torch.float16, fp8=True),  # loads pairs of dims
        attention_case(2, rotary=8, norm=True),
        rotation_case(),
    ]


def all_cases() -> list[Case]:
    """The same with everything that makes another specialisation, for a run by hand."""
    return [
        *(
            step_case(
                kind,
                rows,
                advance=advance,
                dtype=dtype,
                block_sizes=sizes,
                seed=seed,
                hands_over=hands_over,
            )
            for kind, rows in (ROWS | {"everything": COMBINATIONS}).items()
            for advance in (True, False)
            for dtype in (torch.bfloat16, torch.float32)
            for sizes in ((16,), (16, 32))
            for seed in range(3)
            for hands_over in ((False, True) if NEEDS[kind].truncation else (False,))
        ),
        *(accept_case(seed=seed) for seed in range(6)),
        *(place_case(seed=seed) for seed in range(3)),
        *(grammar_case(block_sizes=s, seed=i) for s in ((16,), (16, 32)) for i in range(6)),
        *(
            attention_case(query_len, dtype=dtype, programs=programs, **options)
            for query_len in range(1, MAX_QUERY_LEN + 1)
            for options in ATTENTION_OPTIONS
            for dtype in (torch.float16, torch.float32)
            for programs in (4, 10)
        ),
        attention_case(2, heads=(2, 1), head_size=256),
        *(attention_case(n, rotary=16, norm=True) for n in range(1, MAX_QUERY_LEN + 1)),
        rotation_case(),
    ]
