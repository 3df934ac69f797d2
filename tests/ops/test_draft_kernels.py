"""Native stand-ins for kernels of speculative decoding, against vLLM's, interpreted.

A batch of many requests: greedy and sampled ones, of 0 to 3 drafts, some of them placeholders (-1).
Integers, and with them which drafts are accepted, are equal; sums of exponentials nearly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.interpret_stock import results_of

from fusedstep.vllm_plugin.cpu import draft_kernels, native_draft_kernels
from fusedstep.vllm_plugin.cpu.draft_kernels import STAND_INS

Case = tuple[str, tuple[int, ...], list[Any], dict[str, Any]]
R, N, D, V, BLOCK, RESAMPLE_BLOCK = 30, 16, 3, 200, 128, 64
BLOCKS, RESAMPLE_BLOCKS = 2, 4
UTILS = "spec_decode.rejection_sampler_utils."
HEAD = "spec_decode.target_dependent_ar.speculator."


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def poison(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, -77, dtype=dtype)


class Batch:
    """Drafts and what target and drafter think of them: about half of them hold."""

    def __init__(self, mode: str) -> None:
        """Words of ``mode``: "logits" (the drafter's are known), "bf16", "block", "rates"."""
        self.has_logits = "logits" in mode
        self.dtype = torch.bfloat16 if "bf16" in mode else torch.float32
        lengths = torch.randint(1, D + 2, (N,), dtype=torch.int32)
        self.num_logits = int(lengths.sum())
        self.cu_num_logits = torch.cat([ints(0), lengths.cumsum(0).int()])
        self.idx_mapping = torch.randperm(R)[:N]
        self.expanded = self.idx_mapping.repeat_interleave(lengths)
        self.local_pos = torch.cat([torch.arange(int(n), dtype=torch.int32) for n in lengths])
        self.temperatures = torch.tensor([0.0, 1.0, 0.7, 1.3])[torch.randint(0, 4, (R,))]
        self.seeds = torch.randint(-(2**63), 2**63 - 1, (R,))
        self.positions = torch.randint(0, 2**33, (self.num_logits,))
        self.target = (torch.randn(self.num_logits, V) * 2).to(self.dtype)
        self.drafter = torch.randn(R, D, V)
        drafts = torch.full((self.num_logits,), 3)
        for row, (req, i) in enumerate(zip(self.expanded, self.local_pos, strict=True)):
            if i < D and row + 1 < self.num_logits:
                temperature = float(self.temperatures[req]) or 1.0
                self.drafter[req, i] = self.target[row].float() * temperature
                self.drafter[req, i] += torch.randn(V) * 0.5
                temperature *= float(self.temperatures[req] != 0) or 0.01
                of_drafter = torch.softmax(self.drafter[req, i] / temperature, 0)
                drafts[row + 1] = of_drafter.multinomial(1)
        drafts[torch.rand(self.num_logits) < 0.1] = -1
        self.drafts = drafts.int()
        self.drafter = self.drafter.to(self.dtype)
        self.argmax = torch.zeros(self.num_logits, BLOCKS, dtype=torch.int64)
        self.stats = [torch.zeros(self.num_logits, BLOCKS) for _ in range(4)]
        self.log_ps = self.mass = self.rates = None
        if "rates" in mode:
            self.rates = torch.tensor([0.8, 0.6, 0.4])
        if "block" in mode:
            self.run(self.stats_case())
            self.log_ps = torch.zeros(self.num_logits)
            self.run(self.log_p_case())
            if self.has_logits:
                self.mass = torch.zeros(self.num_logits, BLOCKS)
                self.run(self.mass_case())

    @staticmethod
    def run(case: Case) -> None:
        STAND_INS[case[0]](*case[2], **case[3])

    def drafter_args(self) -> list[Any]:
        return [self.drafter, D * V, V] if self.has_logits else [None, 0, 0]

    def stats_of(self, *which: int) -> list[Any]:
        return [arg for n in which for arg in (self.stats[n], BLOCKS)]

    def stats_case(self) -> Case:
        args = [
            self.argmax, BLOCKS, *self.stats_of(0, 1, 2, 3), self.target, V,
            *self.drafter_args(), self.expanded, self.local_pos, self.temperatures, V, D,
        ]  # fmt: skip
        return UTILS + "_compute_local_logits_stats_kernel", (self.num_logits, BLOCKS), args, {
            "BLOCK_SIZE": BLOCK, "HAS_DRAFT_LOGITS": self.has_logits,
        }  # fmt: skip

    def log_p_case(self) -> Case:
        args = [
            self.log_ps, self.target, V, *self.stats_of(0, 1), self.drafts, *self.drafter_args(),
            *self.stats_of(2, 3), self.cu_num_logits, self.idx_mapping, self.temperatures, BLOCKS,
        ]  # fmt: skip
        return UTILS + "_compute_cumulative_log_p_kernel", (N,), args, {
            "PADDED_VOCAB_NUM_BLOCKS": BLOCKS, "HAS_DRAFT_LOGITS": self.has_logits,
        }  # fmt: skip

    def mass_case(self) -> Case:
        args = [
            self.mass, BLOCKS, self.log_ps, self.target, V, *self.stats_of(0, 1),
            *self.drafter_args(), *self.stats_of(2, 3), self.drafts, self.expanded, self.local_pos,
            self.temperatures, V, D, BLOCKS,
        ]  # fmt: skip
        return UTILS + "_compute_local_residual_mass_kernel", (self.num_logits, BLOCKS), args, {
            "BLOCK_SIZE": BLOCK, "PADDED_VOCAB_NUM_BLOCKS": BLOCKS,
        }  # fmt: skip

    def reject_case(self) -> Case:
        self.sampled = poison(N, D + 1, dtype=torch.int64)
        self.num_sampled = poison(N)
        self.rejected_sums = [torch.zeros(N), torch.zeros(N)]
        args = [
            self.sampled, D + 1, self.num_sampled, *self.rejected_sums, self.target, V,
            self.argmax, BLOCKS, *self.stats_of(0, 1), self.drafts, *self.drafter_args(),
            *self.stats_of(2, 3), self.cu_num_logits, self.idx_mapping, self.temperatures,
            self.seeds, self.positions, self.rates, self.log_ps, self.mass, BLOCKS, BLOCKS,
        ]  # fmt: skip
        return UTILS + "_rejection_kernel", (N,), args, {
            "PADDED_VOCAB_NUM_BLOCKS": BLOCKS, "HAS_DRAFT_LOGITS": self.has_logits,
            "SYNTHETIC_MODE": self.rates is not None,
            "USE_BLOCK_VERIFICATION": self.log_ps is not None,
        }  # fmt: skip

    def resample_case(self) -> Case:
        self.tokens = torch.zeros(N, RESAMPLE_BLOCKS, dtype=torch.int64)
        self.maxima = torch.full((N, RESAMPLE_BLOCKS), -torch.inf)
        args = [
            self.tokens, RESAMPLE_BLOCKS, self.maxima, RESAMPLE_BLOCKS, self.target, V,
            self.rejected_sums[0], *self.drafter_args(), self.rejected_sums[1], self.num_sampled,
            self.cu_num_logits, self.expanded, self.drafts, self.temperatures, self.seeds,
            self.positions, self.log_ps, None, 0, None, None, 0, 0, V,
        ]  # fmt: skip
        return UTILS + "_resample_kernel", (N, RESAMPLE_BLOCKS), args, {
            "BLOCK_SIZE": RESAMPLE_BLOCK, "HAS_DRAFT_LOGITS": self.has_logits, "USE_FP64": False,
            "USE_BLOCK_VERIFICATION": self.log_ps is not None, "CONTEXT_WIDTH": 1,
            "WATERMARK": False, "DEDUPLICATE_CONTEXTS": False,
        }  # fmt: skip

    def insert_case(self) -> Case:
        args = [
            self.sampled, D + 1, self.num_sampled, self.tokens, RESAMPLE_BLOCKS, self.maxima,
            RESAMPLE_BLOCKS, RESAMPLE_BLOCKS, self.cu_num_logits, self.expanded, self.temperatures,
        ]  # fmt: skip
        return UTILS + "_insert_resampled_kernel", (N,), args, {"PADDED_RESAMPLE_NUM_BLOCKS": 4}


STAGES = ("stats", "reject", "resample", "insert")
MODES = (
    *("one-hot", "one-hot bf16", "logits", "logits bf16", "logits rates", "block", "block logits"),
)


def staged(mode: str, stage: str) -> Case:
    """A kernel's arguments behind those that run before it."""
    batch = Batch(mode)
    for each in STAGES[: STAGES.index(stage)]:
        batch.run(getattr(batch, f"{each}_case")())
    return getattr(batch, f"{stage}_case")()  # type: ignore[no-any-return]


def of_blocks(kernel: str, has_logits: bool) -> Case:
    batch = Batch("block logits" if has_logits else "block")
    case: Case = getattr(batch, f"{kernel}_case")()
    case[2][0].fill_(-77)
    return case


def expand() -> Case:
    batch = Batch("one-hot")
    args = [
        batch.idx_mapping, poison(batch.num_logits, dtype=torch.int64), poison(batch.num_logits),
        batch.cu_num_logits,
    ]  # fmt: skip
    return "input_batch._expand_idx_mapping_kernel", (N,), args, {"BLOCK_SIZE": 4}


def gather() -> Case:
    """Some drafts stand within the prompt: placeholders."""
    batch = Batch("one-hot")
    num_tokens = 2 * batch.num_logits
    args = [
        poison(batch.num_logits), poison(batch.num_logits, dtype=torch.int64),
        torch.randint(0, V, (num_tokens,), dtype=torch.int32), torch.randint(0, 50, (num_tokens,)),
        torch.randperm(num_tokens)[: batch.num_logits], batch.expanded, batch.local_pos,
        torch.randint(0, 50, (R,), dtype=torch.int32), batch.num_logits,
    ]  # fmt: skip
    return "spec_decode.rejection_sampler._gather_draft_sampled_kernel", (1,), args, {
        "BLOCK_SIZE": 1024,
    }  # fmt: skip


def flatten_sampled() -> Case:
    batch = Batch("one-hot")
    num_sampled = batch.cu_num_logits.diff() - (torch.rand(N) < 0.5).int()
    args = [
        poison(batch.num_logits, dtype=torch.int64), torch.randint(0, V, (N, D + 1)), D + 1,
        num_sampled, batch.cu_num_logits,
    ]  # fmt: skip
    return "spec_decode.rejection_sampler._flatten_sampled_kernel", (N,), args, {}


# Rows of a drafter's input: a chunk of a prompt, a decode with drafts, one whose drafts all fell.
STARTS, LENS, IDX, MAX_REQS = ints(0, 7, 11, 15), ints(7, 40, 64), torch.tensor([4, 0, 2]), 6


def standalone_prefill() -> Case:
    """The last row is at max_model_len."""
    args = [
        torch.randint(0, V, (20,), dtype=torch.int32), torch.randint(0, 60, (20,)),
        torch.randint(0, V, (MAX_REQS, 1), dtype=torch.int32), IDX,
        poison(30), poison(30, dtype=torch.int64), poison(MAX_REQS, dtype=torch.int64),
        poison(MAX_REQS + 1), poison(MAX_REQS), STARTS, LENS, ints(0, 1, 3), MAX_REQS, 64,
    ]  # fmt: skip
    name = "spec_decode.standalone_ar.speculator._prepare_prefill_inputs_kernel"
    return name, (3,), args, {"BLOCK_SIZE": 8}


def head_prefill() -> Case:
    args = [
        poison(MAX_REQS, dtype=torch.int64), poison(1, dtype=torch.int64), poison(20),
        poison(20, dtype=torch.int64), poison(MAX_REQS + 1), poison(MAX_REQS),
        torch.randint(0, V, (20,), dtype=torch.int32), torch.randint(0, 60, (20,)), IDX,
        torch.randint(0, V, (MAX_REQS, 1)), torch.randint(0, V, (2, MAX_REQS), dtype=torch.int32),
        ints(0, 3, 1), ints(0, 1, 3), STARTS, LENS, MAX_REQS,
    ]  # fmt: skip
    return HEAD + "_prepare_prefill_inputs_kernel", (3,), args, {"BLOCK_SIZE": 8}


def head_decode(advance: bool) -> Case:
    args = [
        torch.randint(0, V, (3, D))[:, 0], D, LENS, ints(0, 1, 0), poison(MAX_REQS),
        torch.tensor([7, 40, 63, 1, 1, 1]), torch.randint(0, 9, (MAX_REQS,)),
        poison(MAX_REQS + 1), poison(MAX_REQS), 64, MAX_REQS,
    ]  # fmt: skip
    return HEAD + "_prepare_decode_inputs_kernel", (4,), args, {
        "BLOCK_SIZE": 8, "ADVANCE_DRAFT_POSITIONS": advance,
    }  # fmt: skip


def head_update(step: int, advance: bool, dtype: torch.dtype) -> Case:
    args = [
        poison(MAX_REQS, D, dtype=torch.int64), D, poison(MAX_REQS, 20, dtype=dtype), 20,
        poison(MAX_REQS), torch.tensor([7, 40, 63, 1, 1, 1]), torch.randint(0, 9, (MAX_REQS,)),
        ints(8, 41, 64, 1, 1, 1), torch.randint(0, V, (3,)), torch.tensor([step]),
        torch.randn(4, 20).to(dtype), 20, 20, 64, D,
    ]  # fmt: skip
    return HEAD + "_update_draft_inputs_kernel", (3,), args, {
        "BLOCK_SIZE": 8, "ADVANCE_DRAFT_POSITIONS": advance,
    }  # fmt: skip


WHERE = {  # a stage differs in these modes
    "stats": ("one-hot bf16", "logits", "logits bf16"),
    "reject": MODES,
    "resample": ("one-hot", "one-hot bf16", "logits", "logits bf16", "block logits"),
    "insert": ("logits",),
}
CASES: dict[str, Callable[[], Case]] = {
    f"{stage} {mode}": lambda mode=mode, stage=stage: staged(mode, stage)  # type: ignore[misc]
    for stage, modes in WHERE.items()
    for mode in modes
} | {
    "log_p": lambda: of_blocks("log_p", has_logits=False),
    "log_p logits": lambda: of_blocks("log_p", has_logits=True),
    "mass": lambda: of_blocks("mass", has_logits=True),
    "expand": expand,
    "gather": gather,
    "flatten": flatten_sampled,
    "standalone prefill": standalone_prefill,
    "head prefill": head_prefill,
    "head decode": lambda: head_decode(advance=True),
    "head decode, same position": lambda: head_decode(advance=False),
    "head update": lambda: head_update(1, advance=True, dtype=torch.bfloat16),
    "head update, same position": lambda: head_update(0, advance=False, dtype=torch.float32),
    "head update, last": lambda: head_update(D - 1, advance=True, dtype=torch.float32),
}


def build(name: str) -> Case:
    torch.manual_seed(sorted(CASES).index(name))
    return CASES[name]()


def tensors_of(args: list[Any]) -> list[torch.Tensor]:
    return [arg for arg in args if isinstance(arg, torch.Tensor)]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The arguments of every case after vLLM's kernel, or its error."""
    cases = [build(name) for name in CASES]
    named = [("gpu." + kernel, *rest) for kernel, *rest in cases]
    results = results_of(named, tmp_path_factory.mktemp("stock"))
    return dict(zip(CASES, results, strict=True))


def differences(name: str, stock: list[Any]) -> list[str]:
    """What the stand-in does otherwise than the kernel; floats may be rounded otherwise."""
    kernel, _, args, constants = build(name)
    before = [t.clone() for t in tensors_of(args)]
    STAND_INS[kernel](*args, **constants)
    mine, theirs = tensors_of(args), tensors_of(stock)
    assert any(not torch.equal(a, b) for a, b in zip(before, theirs, strict=True)), "does nothing"
    if name.startswith("resample"):  # as vLLM reduces the blocks
        mine, theirs = ([t[0].gather(1, t[1].argmax(1, keepdim=True))] for t in (mine, theirs))
    different = []
    for n, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        same = torch.allclose(a, b, rtol=2e-6, atol=2e-6) if a.is_floating_point() else None
        if not (torch.equal(a, b) if same is None else same):
            different.append(f"tensor {n}: {a} is not {b}")
    return different


@pytest.mark.parametrize("name", CASES)
def test_stand_in(name: str, interpreted: dict[str, Any]) -> None:
    stock = interpreted[name]
    assert not isinstance(stock, str), stock
    assert not differences(name, stock)


@pytest.mark.parametrize("mode", ["logits", "logits bf16"])
def test_stats_where_the_number_of_logits_is_told(mode: str) -> None:
    """vLLM 0.33's kernel is told it in the place of the number of drafts."""
    results = []
    for is_new in (False, True):
        kernel, _, args, constants = build(f"stats {mode}")
        args[-1] = len(args[0]) if is_new else D
        STAND_INS[kernel](*args, **constants)
        results.append(tensors_of(args))
    assert all(map(torch.equal, *results))


def test_drafts_hold_now_and_then(interpreted: dict[str, Any]) -> None:
    """The cases are of use: drafts are accepted and rejected, of greedy requests and others."""
    accepted, drafts = torch.zeros(2), torch.zeros(2)
    for mode in MODES:
        args = interpreted[f"reject {mode}"]
        num_accepted, cu_num_logits, idx_mapping, temperatures = args[2], *args[21:24]
        is_greedy = (temperatures[idx_mapping] == 0).long()
        accepted.index_add_(0, is_greedy, num_accepted.float())
        drafts.index_add_(0, is_greedy, cu_num_logits.diff().float() - 1)
    assert (accepted / drafts > 0.2).all() and (accepted / drafts < 0.8).all(), accepted / drafts


def test_other_random_numbers_show(
    interpreted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: another number decides otherwise about drafts, and about what replaces them."""
    reject = native_draft_kernels.reject

    def of_other_seeds(*args: Any) -> None:
        reject(*args[:9], args[9] + 1, *args[10:])

    monkeypatch.setattr(draft_kernels.native, "reject", of_other_seeds)
    for mode in MODES:
        assert differences(f"reject {mode}", interpreted[f"reject {mode}"])


@pytest.mark.parametrize("what", ["WATERMARK", "USE_FP64"])
def test_other_noise_is_left_to_vllm(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, grid, args, constants = build("resample logits")
    launched: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **constants: launched.append((grid, args, constants))

    monkeypatch.setitem(draft_kernels.STOCK, name, Kernel())
    constants = constants | {what: True}
    STAND_INS[name](*args, **constants)
    assert launched == [(torch.Size(grid), tuple(args), constants)]
