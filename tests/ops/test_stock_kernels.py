"""The native stand-ins against the stock Triton kernels themselves, interpreted.

The penalties and temperature kernels do not run in the interpreter (Triton 3.9: "'int' object has
no attribute 'to'"); they are compared with ``ops.reference`` here. The interpreter's logarithm is
numpy's, up to 4 units in the last place off, so noise may differ that much; tokens may not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ops.interpret_stock import results_of

from fusedstep.ops import reference
from fusedstep.vllm_plugin.cpu import stock_kernels

Case = tuple[str, tuple[int, ...], list[Any], dict[str, Any]]
V = 3000
IDX = torch.tensor([4, 0, 2])  # batch_idx -> req_state_idx; R = 6
R = 6


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def randint(high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.randint(1, high, shape).to(dtype)


def poison(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, -77, dtype=dtype)


def prefill_inputs() -> Case:
    args = [
        poison(40), poison(2, R), R, 2, IDX, ints(0, 5, 6, 16), randint(100, R, 64), 64,
        ints(20, 9, 12, 9, 5, 9), ints(15, 0, 2, 0, 0, 0),
    ]  # fmt: skip
    return "input_batch._prepare_prefill_inputs_kernel", (3,), args, {
        "BLOCK_SIZE": 1024, "LOOKAHEAD_BLOCK": 2,
    }  # fmt: skip


def pos_seq_lens() -> Case:
    args = [poison(40, dtype=torch.int64), poison(R), IDX, ints(0, 5, 6, 16), randint(50, R), R]
    return "input_batch._prepare_pos_seq_lens_kernel", (4,), args, {"BLOCK_SIZE": 1024}


def rope_positions() -> Case:
    """Rows: a whole prompt, a decode, a chunk of a prompt; a delta may be negative."""
    args = [
        poison(3, 41, dtype=torch.int64), 41, randint(60, R * 3, 64), 3 * 64, 64,
        randint(30, R) - 20, IDX, ints(0, 5, 6, 16),
        ints(20, 9, 12, 9, 5, 9), ints(24, 0, 2, 0, 0, 0),
    ]  # fmt: skip
    return "mm.rope._prepare_rope_positions_kernel", (3,), args, {
        "BLOCK_SIZE": 1024, "NUM_DIMS": 3,
    }  # fmt: skip


def combine(drafts: int) -> Case:
    """Rows: chunk of a prefill, first decode after a prompt, decode with ``drafts``."""
    num_logits = 2 + 1 + drafts
    args = [
        poison(40), IDX, randint(100, R, 1, dtype=torch.int64), ints(0, 5, 6, 7 + drafts),
        ints(5, 10, 30), ints(30, 8, 9, 8, 7, 8), randint(100, R, 3, dtype=torch.int64), 3,
        ints(0, 1, 2, num_logits), poison(num_logits, dtype=torch.int64),
    ]  # fmt: skip
    return "input_batch._combine_sampled_and_draft_tokens_kernel", (3,), args, {
        "NUM_NEW_SAMPLED_TOKENS": 1, "BLOCK_SIZE": 4,
    }  # fmt: skip


def num_sampled_and_rejected() -> Case:
    args = [
        ints(1, 1, 3),
        poison(3),
        ints(5, 10, 30),
        ints(0, 1, 2, 6),
        IDX,
        ints(8, 8, 8, 8, 9, 8),
    ]
    return "input_batch._get_num_sampled_and_rejected_kernel", (3,), args, {}


def post_update(with_counts: bool) -> Case:
    idx = IDX.clone()
    idx[1] = -1
    args = [
        idx, randint(9, R), randint(100, R, 1, dtype=torch.int64),
        randint(9, R, 100) if with_counts else None, 100,
        randint(100, 3, 2, dtype=torch.int64), 2, ints(2, 1, 1), ints(0, 0, 1),
        ints(0, 5, 6, 8) if with_counts else None, randint(100, R, 64), 64, randint(50, R),
    ]  # fmt: skip
    return "input_batch._post_update_kernel", (3,), args, {}


def post_update_num_computed() -> Case:
    args = [IDX, randint(9, R), ints(0, 5, 6, 8)]
    return "input_batch._post_update_num_computed_tokens_kernel", (3,), args, {}


def gather_tables() -> Case:
    """All rows beyond the batch are padding, as the stand-in assumes."""
    sources = [randint(10**6, R, 8), randint(10**6, R, 4)]
    targets = [poison(R, 8), poison(R, 4)]
    args = [
        IDX, ("pointers", sources), ("pointers", targets), torch.tensor([8, 4]),
        torch.stack([randint(8, R), randint(4, R)]), R, 3,
    ]  # fmt: skip
    return "block_table._gather_block_tables_kernel", (2, R), args, {"BLOCK_SIZE": 1024}


def slot_mappings() -> Case:
    idx = IDX.clone()
    idx[2] = -1
    tables = [randint(10**6, R, 8), randint(10**6, R, 16), randint(10**6, R, 8)]
    args = [
        40, idx, ints(0, 5, 6, 16), torch.randint(0, 60, (40,)), ("pointers", tables),
        torch.tensor([8, 16, 8]), ints(16, 5, 16), torch.tensor([True, True, False]),
        torch.tensor([True] * 3), poison(3, 40, dtype=torch.int64), 40, 0,
    ]  # fmt: skip
    return "block_table._compute_slot_mappings_kernel", (3, 4), args, {
        "CP_SIZE": 1, "CP_INTERLEAVE": 1, "PAD_ID": -1, "TRITON_BLOCK_SIZE": 1024,
    }  # fmt: skip


def write_one(dtype: torch.dtype) -> Case:
    args = [
        poison(R, 20, dtype=dtype), 20, ints(3, 0), ints(2, 0), randint(99, 9, dtype=dtype),
        ints(4, 9), None,
    ]  # fmt: skip
    return "buffer_utils._apply_write_kernel", (2,), args, {
        "BLOCK_SIZE": 1024, "MULTI_GROUP": False,
    }  # fmt: skip


def write_groups() -> Case:
    args = [
        ("pointers", [poison(R, 20), poison(R, 8)]), torch.tensor([20, 8]), ints(3, 0, 5),
        ints(2, 0, 1), randint(99, 12), ints(4, 9, 12), ints(0, 1, 0),
    ]  # fmt: skip
    return "buffer_utils._apply_write_kernel", (3,), args, {
        "BLOCK_SIZE": 1024, "MULTI_GROUP": True,
    }  # fmt: skip


def gumbel(dtype: torch.dtype, apply_temperature: bool, drafting: bool) -> Case:
    num_blocks = -(-V // 1024)
    logits = (torch.randn(3, V) * 3).to(dtype)
    temperatures = torch.tensor([1.0, 0.3, 0.7, 1.0, 0.0, 1.0])
    args = [
        poison(3, num_blocks, dtype=torch.int64), num_blocks,
        torch.zeros(3, num_blocks), num_blocks, None, 0, 0,
        None, None, 0, logits, V, IDX, torch.randint(-(2**63), 2**63 - 1, (R,)),
        torch.randint(0, 9999, (3,)), temperatures, V,
    ]  # fmt: skip
    return "sample.gumbel._gumbel_sample_kernel", (3, num_blocks), args, {
        "BLOCK_SIZE": 1024, "IS_DRAFTING": drafting, "APPLY_TEMPERATURE": apply_temperature,
        "USE_FP64": False, "PER_TOKEN_COL": False,
    }  # fmt: skip


def noise(drafting: bool) -> Case:
    """Flat logits: what the kernel finds is noise."""
    case = gumbel(torch.float32, True, drafting)
    case[2][10].zero_()
    case[2][15].fill_(1.0)
    return case


def bincount() -> Case:
    args = [
        IDX, randint(V, R, 64), 64, ints(9, 8, 7, 6, 5, 4), ints(12, 8, 60, 6, 30, 4),
        torch.zeros(R, -(-V // 32), dtype=torch.int32), -(-V // 32),
        torch.zeros(R, V, dtype=torch.int32), V,
    ]  # fmt: skip
    return "sample.penalties._bincount_kernel", (3, 1), args, {"BLOCK_SIZE": 1024}


def bias(restore: bool) -> Case:
    """Row 0 forbids the only tokens it allows; with ``restore`` it gets them back."""
    allowed = torch.arange(R * 8).view(R, 8).int() * 7
    args = [
        torch.randn(3, V), V, V, IDX, ints(0, 0, 5, 0, 2, 0), allowed, 8, ints(3, 0, 2, 0, 0, 0),
        torch.arange(R * 8).view(R, 8).int() * 11, 8, torch.randn(R, 8), 8,
        torch.tensor([4, 4, 9]), ints(10, 10, 10, 10, 10, 10), ints(1, 0, 2, 0, 2, 0),
        ints(*[int(restore)] * R), allowed[:, :4].contiguous(), 4,
    ]  # fmt: skip
    return "sample.logit_bias._bias_kernel", (3,), args, {
        "BLOCK_SIZE": 8, "LOGITS_BLOCK_SIZE": 1024, "CHECK_ALL_MASKED_ROWS": restore,
    }  # fmt: skip


def bad_words(drafts: int) -> Case:
    """Words of 1, 2 and 3 tokens, the last too long for row 1; logits of rows 4, 0 and drafts."""
    output = torch.zeros(R, 32).int()
    output[:, 4:9] = ints(3, 7, 5, 8, 6)
    tokens = torch.zeros(R, 16).int()
    tokens[:, :12] = ints(11, 6, 12, 8, 6, 13, 8, 9, 14, 6, 40, 15)
    idx = torch.tensor([4, 0] + [2] * (1 + drafts))
    args = [
        torch.randn(3 + drafts, V), V, idx, tokens, 16,
        ints(0, 1, 3, 6, 9, 12).repeat(R, 1).contiguous(), 6, ints(5, 5, 5, 0, 5, 0), output, 32,
        ints(*[4] * R), ints(5, 9, 9, 9, 9, 9), ints(0, 0, 6, *[40] * drafts),
        ints(0, 0, 0, *range(1, 1 + drafts)),
    ]  # fmt: skip
    return "sample.bad_words._bad_words_kernel", (3 + drafts, 5), args, {}


def min_p() -> Case:
    args = [torch.randn(3, V), V, IDX, torch.tensor([0.1, 0.1, 0.0, 0.1, 0.5, 0.1]), V]
    return "sample.min_p._min_p_kernel", (3,), args, {"BLOCK_SIZE": 1024}


def log_softmax(dtype: torch.dtype) -> Case:
    ids = torch.randint(0, V, (3, 5))
    args = [poison(3, 5, dtype=torch.float32), (torch.randn(3, V) * 3).to(dtype), V, ids, 5, 5, V]
    return "sample.logprob._topk_log_softmax_kernel", (3,), args, {
        "BLOCK_SIZE": 1024, "TOPK_BLOCK_SIZE": 8,
    }  # fmt: skip


def ranks() -> Case:
    """Not bfloat16: the interpreter compares its bits as integers."""
    logits = torch.randn(3, V).round(decimals=1)
    args = [poison(3, dtype=torch.int64), logits, V, torch.randint(0, V, (3,)), V]
    return "sample.logprob._ranks_kernel", (3,), args, {"BLOCK_SIZE": 8192}


def fill_ids() -> Case:
    args = [
        torch.zeros(3, 5, dtype=torch.int64), 5, torch.zeros(3, 5, dtype=torch.bool), 5,
        torch.randint(0, V, (3,)), randint(V, 3, 2), 2, IDX, ints(0, 0, 4, 0, 3, 0),
        randint(V, R, 8), 8,
    ]  # fmt: skip
    return "sample.logprob._fill_logprob_token_ids_kernel", (3,), args, {
        "NUM_TOPK": 2, "PADDED_COLS": 4,
    }  # fmt: skip


def penalties(drafts: int) -> Case:
    num_words = -(-V // 32)
    args = [
        torch.randn(3 + drafts, V), V, torch.tensor([4, 0] + [2] * (1 + drafts)),
        ints(0, 0, 6, *[40] * drafts), ints(0, 0, 0, *range(1, 1 + drafts)),
        torch.tensor([1.0, 1.3, 1.3, 1.0, 0.7, 1.0]), torch.tensor([0.0, 0, 0.5, 0, 0.2, 0]),
        torch.tensor([0.0, 0, 0.1, 0, 0, 0]), randint(2**31 - 1, R, num_words), num_words,
        (torch.rand(R, V) < 0.1).int() * 2, V, V,
    ]  # fmt: skip
    return "sample.penalties._penalties_kernel", (3 + drafts, 1), args, {"BLOCK_SIZE": 8192}


def temperature() -> Case:
    args = [torch.randn(3, V), V, IDX, torch.tensor([0.0, 1.0, 0.3, 1.0, 7.0, 1.0]), V]
    return "sample.gumbel._temperature_kernel", (3, 1), args, {"BLOCK_SIZE": 8192}


# Token ids of which thoughts are made: (1) begins one, (2, 3) ends it, (4, 2, 3) is the forced end.
MARKERS = ints(1), ints(2, 3), ints(4, 2, 3)
BUDGETS = ints(-1, 3, 0, 5, 9, 2)


def thoughts() -> torch.Tensor:
    return torch.randint(1, 5, (R, 64), dtype=torch.int32)


def marker_cache(scanned: bool) -> Case:
    """Cold, or from where the last look ended; one request is shorter than it was.

    One block holds all: stock's cold look ends at the first block with a marker, and leaves the
    other marker's place at -1 if that lies before it. Which of both is the later is the same.
    """
    total_len = ints(40, 33, 1, 64, 25, 50)
    last = ints(7, 9, -1, 12, 3, 60) if scanned else ints(*[-1] * R)
    scan_pos = ints(38, 31, 0, 50, 20, 63) if scanned else ints(*[0] * R)
    rows = torch.tensor([4, 0, 2, 5, 1])
    args = [
        rows, BUDGETS, thoughts(), 64, total_len, last.clone(), (last - 2).clamp(min=-1), scan_pos,
        *MARKERS[:2],
    ]  # fmt: skip
    return "sample.thinking_budget._update_committed_marker_cache_kernel", (len(rows),), args, {
        "START_LEN": 1, "NATURAL_END_LEN": 2, "MAX_LEN": 2, "BLOCK": 64,
    }  # fmt: skip


def thinking(drafts: int) -> Case:
    """Many requests: in a thought, after one, at each place of the forced end."""
    num_reqs = 60
    tokens = torch.randint(1, 5, (num_reqs, 8), dtype=torch.int32)
    first = torch.randint(-1, 4, (num_reqs,), dtype=torch.int32)
    rows = torch.arange(num_reqs).repeat_interleave(1 + drafts)
    budgets = torch.randint(-1, 6, (num_reqs,), dtype=torch.int32)
    args = [
        torch.randn(len(rows), 9), 9, rows, budgets, tokens, 8,
        torch.randint(1, 9, (num_reqs,), dtype=torch.int32),
        torch.randint(1, 5, (len(rows),), dtype=torch.int32),
        torch.arange(1 + drafts, dtype=torch.int32).repeat(num_reqs),
        first, torch.randint(-1, 4, (num_reqs,), dtype=torch.int32), *MARKERS,
    ]  # fmt: skip
    return "sample.thinking_budget._thinking_budget_kernel", (len(rows),), args, {
        "START_LEN": 1, "NATURAL_END_LEN": 2, "END_LEN": 3,
    }  # fmt: skip


CASES: dict[str, Callable[[], Case]] = {
    "prefill_inputs": prefill_inputs,
    "pos_seq_lens": pos_seq_lens,
    "rope_positions": rope_positions,
    "combine": lambda: combine(0),
    "combine-drafts": lambda: combine(3),
    "num_sampled_and_rejected": num_sampled_and_rejected,
    "post_update": lambda: post_update(True),
    "post_update-no-counts": lambda: post_update(False),
    "post_update_num_computed": post_update_num_computed,
    "gather_tables": gather_tables,
    "slot_mappings": slot_mappings,
    "write-int32": lambda: write_one(torch.int32),
    "write-float32": lambda: write_one(torch.float32),
    "write-groups": write_groups,
    "gumbel-bf16": lambda: gumbel(torch.bfloat16, True, False),
    "gumbel-f32": lambda: gumbel(torch.float32, False, False),
    "gumbel-draft": lambda: gumbel(torch.float16, True, True),
    "noise": lambda: noise(False),
    "noise-draft": lambda: noise(True),
    "bincount": bincount,
    "bias": lambda: bias(False),
    "bias-restore": lambda: bias(True),
    "bad_words": lambda: bad_words(0),
    "bad_words-drafts": lambda: bad_words(2),
    "min_p": min_p,
    "log_softmax-f32": lambda: log_softmax(torch.float32),
    "log_softmax-bf16": lambda: log_softmax(torch.bfloat16),
    "ranks": ranks,
    "fill_ids": fill_ids,
    "penalties": lambda: penalties(0),
    "temperature": temperature,
    "marker_cache-cold": lambda: marker_cache(False),
    "marker_cache": lambda: marker_cache(True),
    "thinking": lambda: thinking(0),
    "thinking-drafts": lambda: thinking(2),
}


NOT_INTERPRETED = ("penalties", "temperature")


def build(name: str) -> Case:
    torch.manual_seed(sorted(CASES).index(name))
    return CASES[name]()


def run_stand_in(case: Case) -> list[Any]:
    kernel, _, args, constants = case
    pointers = [isinstance(arg, tuple) for arg in args]
    tables = [
        torch.tensor([t.data_ptr() for t in arg[1]], dtype=torch.uint64) if is_pointers else arg
        for arg, is_pointers in zip(args, pointers, strict=True)
    ]
    stand_in = stock_kernels._stand_ins()["vllm.v1.worker.gpu." + kernel]
    stand_in(*tables, **constants)
    return args


def flatten(args: list[Any]) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for arg in args:
        tensors += arg[1] if isinstance(arg, tuple) else [arg] * isinstance(arg, torch.Tensor)
    return tensors


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The arguments of every case after the stock kernel, or its error."""
    cases = [build(name) for name in CASES]
    named = [("gpu." + kernel, *rest) for kernel, *rest in cases]
    results = results_of(named, tmp_path_factory.mktemp("stock"))
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_INTERPRETED])
def test_stand_in(name: str, interpreted: dict[str, Any]) -> None:
    stock = interpreted[name]
    assert not isinstance(stock, str), stock
    out = run_stand_in(build(name))
    if name.startswith(("gumbel", "noise")):
        assert sampled(out) == sampled(stock)
        return
    tolerance = 1e-6 if "log_softmax" in name else 0
    pairs = list(zip(flatten(out), flatten(stock), strict=True))
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    changed = zip(flatten(build(name)[2]), flatten(out), strict=True)
    assert any(not torch.equal(before, after) for before, after in changed), "nothing was tested"


def sampled(gumbel_args: list[Any]) -> list[int]:
    """As ``gumbel_sample`` reduces the blocks."""
    block = gumbel_args[2].argmax(-1, keepdim=True)
    return gumbel_args[0].gather(-1, block).view(-1).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("drafting", [False, True], ids=["target", "draft"])
def test_noise_is_stock_noise(drafting: bool, interpreted: dict[str, Any]) -> None:
    """Of flat logits a block's maximum is its largest noise, so blocks show the stock noise."""
    stock = interpreted["noise-draft" if drafting else "noise"]
    seeds, positions = stock[13], stock[14]
    for row, req in enumerate(IDX.tolist()):
        position = int(positions[row]) + (1 << 30) * drafting
        noise = reference.gumbel_noise(int(seeds[req]), position, torch.arange(V))
        for block, mine in enumerate(torch.split(noise, 1024)):
            assert int(stock[0][row, block]) == block * 1024 + int(mine.argmax())
            torch.testing.assert_close(stock[2][row, block], mine.max(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("drafts", [0, 2])
def test_penalties(drafts: int) -> None:
    _, _, before, _ = case = build("penalties") if not drafts else penalties(drafts)
    logits = before[0].clone()
    out = run_stand_in(case)[0]
    for i, req in enumerate(before[2].tolist()):
        counts = before[10].clone()
        for token in before[3][i - int(before[4][i]) + 1 : i + 1].tolist():
            counts[req, token] += 1
        requests = SimpleNamespace(prompt_bin_mask=before[8], output_bin_counts=counts)
        sampling = SimpleNamespace(
            repetition_penalty=before[5], frequency_penalty=before[6], presence_penalty=before[7]
        )
        expected = reference.apply_penalties(logits[i], req, requests, sampling)  # type: ignore[arg-type]
        torch.testing.assert_close(out[i], expected, rtol=0, atol=0)


def test_temperature() -> None:
    case = build("temperature")
    logits, temperatures = case[2][0].clone(), case[2][3][IDX].clone()
    temperatures[temperatures == 0] = 1
    expected = logits / temperatures[:, None]
    torch.testing.assert_close(run_stand_in(case)[0], expected, rtol=0, atol=0)


def test_every_stock_kernel_exists() -> None:
    """The platform registers a stand-in for each kernel, and no module holds on to a kernel that
    has one; a second call changes nothing."""
    code = """
import sys
from fusedstep.vllm_plugin.cpu import stock_kernels, triton_stand_in as triton_cpu
triton_cpu.install()
import vllm.v1.worker.gpu.model_runner
from fusedstep.vllm_plugin.cpu.platform import OracleCpuPlatform
OracleCpuPlatform.register_triton_kernel_overrides()
from vllm.triton_utils import dispatcher
before = dict(dispatcher._registry)
stock_kernels.register()
assert dispatcher._registry == before
assert set(stock_kernels._stand_ins()) <= set(before)
stock = {id(kernel) for kernel, _ in before.values()}
for name, module in list(sys.modules.items()):
    held = [key for key, value in list(vars(module).items()) if id(value) in stock]
    assert not held, (name, held)
"""
    env = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grammar_bitmask(dtype):
    """Against the definition: the interpreter cannot run this kernel (its mask has no dtype)."""
    from fusedstep.vllm_plugin.cpu.stock_kernels import apply_grammar_bitmask

    generator = torch.Generator().manual_seed(5)
    vocab_size, cu_num_logits = 77, torch.tensor([0, 1, 3, 4], dtype=torch.int32)
    allowed = torch.rand(2, 96, generator=generator) < 0.5
    bitmask = (allowed.view(2, 3, 32).long() << torch.arange(32)).sum(-1).to(torch.int32)
    mapping = torch.tensor([2 * 2 + 1, 1 * 2 + 1], dtype=torch.int32)  # no such row; row 2
    logits = torch.randn(4, vocab_size, generator=generator).to(dtype)
    expected = logits.clone()
    expected[2, ~allowed[1, :vocab_size]] = -torch.inf
    apply_grammar_bitmask(
        logits, vocab_size, mapping, cu_num_logits, bitmask, 3, vocab_size, MASK_STRIDE=2
    )
    assert torch.equal(logits, expected)
