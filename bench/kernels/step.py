"""One decode step's work between lm_head and the next forward: stock vLLM, ours, and the floor.

The floor is the time in which the memory could deliver what a step cannot avoid to read. On CUDA
both sides are CUDA graphs of one step per logits buffer, timed by events; on the CPU single calls
are timed. The buffers are used in turn and are larger than the caches, so logits come from
memory, unless a small vocabulary makes all buffers small (``logits_mib``). Penalty counts of a
small batch may stay in a cache, on both sides.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
import torch

from fusedstep.bench.environment import machine
from fusedstep.bench.kernels.step_state import CONTEXT_LEN, FusedStep, build_state
from fusedstep.bench.progress import NO_PROGRESS, Progress
from fusedstep.bench.spread import (
    Spread,
    Timer,
    count_launches,
    keep_freed_memory,
    memory_bandwidth,
)
from fusedstep.errors import ConfigError, UnsupportedError
from fusedstep.ops import dispatch
from fusedstep.ops.types import BatchNeeds
from fusedstep.vllm_plugin.compat import SWITCH

if TYPE_CHECKING:
    from types import ModuleType

BUFFER_BYTES = 128 << 20  # logits in turn: more than twice an H100's L2 cache of 50 MB
MAX_BUFFERS = 512
BYTES_PER_LOGIT = 20  # beside the logits: float32 copies of either side, counts for penalties
LOGPROB_TOLERANCE = 1e-4
PENALTIES = {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.2}
COMPARED_TOKENS = 64  # at least, where there are buffers enough


@dataclass(frozen=True)
class Case:
    """Sampling parameters of all rows (vLLM's names), and the logits' standard deviation."""

    name: str
    params: dict[str, Any]
    logits_std: float = 3.0

    @property
    def needs(self) -> BatchNeeds:
        return BatchNeeds(
            adjustment=not PENALTIES.keys().isdisjoint(self.params),
            min_p="min_p" in self.params,
            truncation=not {"top_k", "top_p"}.isdisjoint(self.params),
            logprobs="logprobs" in self.params,
        )

    def moved_bytes(self, batch_size: int, vocab_size: int, dtype: torch.dtype) -> int:
        """Bytes that a step must read: logits, and counts and prompt mask for penalties.

        The rest of the requests' state is less than 1 % of that and left out.
        """
        row = vocab_size * dtype.itemsize
        if not PENALTIES.keys().isdisjoint(self.params):
            row += 4 * vocab_size + 4 * math.ceil(vocab_size / 32)
        return batch_size * row


CASES = (
    Case("greedy", {"temperature": 0.0}),
    Case("temperature", {"temperature": 0.8}),
    Case("top_p", {"temperature": 0.8, "top_p": 0.95}),
    Case("top_k_top_p", {"temperature": 0.7, "top_k": 20, "top_p": 0.95}),
    Case("min_p", {"temperature": 0.8, "min_p": 0.05}),
    Case("penalties", {"temperature": 0.8, **PENALTIES}),
    Case("logprobs", {"temperature": 0.0, "logprobs": 0}),
    Case("top_p_flat", {"temperature": 0.8, "top_p": 0.95}, logits_std=0.5),
)


@dataclass(frozen=True)
class Plan:
    """Settings of a measurement."""

    device: torch.device
    cases: tuple[Case, ...]
    batch_sizes: tuple[int, ...]
    vocab_size: int
    dtype: torch.dtype  # of the logits
    repeats: int


@dataclass(frozen=True)
class Row:
    """One case at one batch size; times in microseconds per step."""

    case: str
    batch_size: int
    stock_us: Spread
    fusedstep_us: Spread
    stock_unseeded_us: Spread | None  # where stock has another sampler for rows without a seed
    stock_launches: int | None  # kernels of one step, CUDA only
    fusedstep_launches: int | None
    stock_captured: bool | None  # in a CUDA graph; False: launched one by one
    fusedstep_captured: bool | None
    stock_unseeded_captured: bool | None
    num_compared: int  # outputs of both
    num_tied: int  # other tokens, but only because equal logits lie at the cut of top-p (CPU)
    num_different: int  # other outputs for no such reason
    moved_bytes: int  # what a step must read
    floor_us: float
    logits_mib: float  # of all buffers

    @property
    def ratio(self) -> float | None:
        """Stock's time by ours; None if their outputs differ."""
        return None if self.num_different else self.stock_us.p50 / self.fusedstep_us.p50

    @property
    def gb_per_s(self) -> float:
        """Rate at which our step gets through what it must read."""
        return self.moved_bytes / self.fusedstep_us.p50 / 1e3

    @property
    def floor_share(self) -> float:
        """The floor by our time: 1 is as fast as the memory."""
        return self.floor_us / self.fusedstep_us.p50


@dataclass(frozen=True)
class Result:
    env: dict[str, Any]
    bandwidth_gb_per_s: float  # see memory_bandwidth
    rows: list[Row] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        derived = ("ratio", "gb_per_s", "floor_share")
        return asdict(self) | {
            "rows": [asdict(row) | {key: getattr(row, key) for key in derived} for row in self.rows]
        }


def pick_cases(names: tuple[str, ...]) -> tuple[Case, ...]:
    """The cases of these names, all without names; ConfigError for an unknown one."""
    known = [case.name for case in CASES]
    for name in names:
        if name not in known:
            raise ConfigError(f"no case {name!r}: use {', '.join(known)}")
    return tuple(case for case in CASES if not names or case.name in names)


def pick_device(name: str | None) -> torch.device:
    """The device of this name, else the GPU if there is one; ConfigError for a missing GPU."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device(name or ("cuda" if has_gpu else "cpu"))


@torch.inference_mode()
def measure(plan: Plan, progress: Progress = NO_PROGRESS) -> Result:
    """All cases at all batch sizes; each repeat times stock, then ours.

    Raises UnsupportedError if our step or the installed vLLM cannot run on the device.
    """
    choice = dispatch.resolve(plan.device)
    if choice.name is None:
        raise UnsupportedError(choice.reason)
    if plan.device.type == "cpu":
        keep_freed_memory()
    _check_memory(plan)
    progress.say("importing vLLM")
    stock = stock_vllm()
    stock.check_platform(plan.device)
    progress.say("measuring the memory bandwidth")
    bandwidth = memory_bandwidth(plan.device)
    env = machine()
    if plan.device.type == "cpu":  # as in vLLM's worker, which leaves a core to the scheduler
        torch.set_num_threads(max(1, (env["cores"] or torch.get_num_threads()) - 1))
    env |= {
        "device_type": plan.device.type,
        "threads": torch.get_num_threads(),
        "ops": choice.name,
        "vocab_size": plan.vocab_size,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "repeats": plan.repeats,
    }
    result = Result(env, bandwidth / 1e9)
    for batch_size in plan.batch_sizes:
        for std in sorted({case.logits_std for case in plan.cases}, reverse=True):
            buffers = make_logits(plan, batch_size, std)
            for case in (case for case in plan.cases if case.logits_std == std):
                progress.say(f"batch {batch_size}, {case.name}")
                result.rows.append(_measure_row(plan, case, buffers, choice.name, stock, bandwidth))
                progress.keep(result.as_dict())
    return result


def _check_memory(plan: Plan) -> None:
    """Raises ConfigError for batches that have no room: logits, copies of both sides, counts."""
    logits = max(plan.batch_sizes) * plan.vocab_size
    needed = BUFFER_BYTES + logits * (plan.dtype.itemsize + BYTES_PER_LOGIT)
    if plan.device.type == "cuda":
        free = torch.cuda.mem_get_info(plan.device)[0]
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"--batch-size {max(plan.batch_sizes)} of {plan.vocab_size} logits needs "
            f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: lower it or --vocab-size"
        )


def stock_vllm() -> ModuleType:
    """vLLM as it comes, without our platform, and quiet: stdout is for data."""
    os.environ.pop(SWITCH, None)
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR"))
    from fusedstep.bench.kernels import stock_step

    return stock_step


def _measure_row(
    plan: Plan, case: Case, buffers: torch.Tensor, ops: str, vllm: ModuleType, bandwidth: float
) -> Row:
    num_steps, batch_size, _ = buffers.shape
    state = build_state(case.params, batch_size, plan.vocab_size, num_steps, plan.device)
    ours = FusedStep(ops, state, case.needs)
    if plan.device.type == "cpu":
        stock: Any = vllm.StockSampler(state.requests, state.sampling, case.params)
    else:
        stock = vllm.StockStep(*state.for_stock(), case.params)
    steps = {"stock": stock, "fusedstep": ours}
    if stock.has_faster_sampler:
        steps["stock_unseeded"] = vllm.StockStep(*state.for_stock(), case.params, seeded=False)
    agreement = compare(stock, ours, buffers)
    timers = {name: Timer(step, buffers) for name, step in steps.items()}
    if plan.device.type == "cuda":  # what the timed work leaves behind: a token per buffer and row
        tokens = ours.tokens(CONTEXT_LEN, num_steps).T, stock.tokens(CONTEXT_LEN, num_steps).T
        for turn, (out, ref) in enumerate(zip(*tokens, strict=True)):
            agreement.add(ours, buffers[turn], turn, out, ref, out != ref)
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(plan.repeats):
        for name, timer in timers.items():
            times[name].append(timer())
    spreads = {name: Spread.of(values) for name, values in times.items()}
    moved_bytes = case.moved_bytes(batch_size, plan.vocab_size, plan.dtype)
    return Row(
        case=case.name,
        batch_size=batch_size,
        stock_us=spreads["stock"],
        fusedstep_us=spreads["fusedstep"],
        stock_unseeded_us=spreads.get("stock_unseeded"),
        stock_launches=count_launches(stock, buffers[0]),
        fusedstep_launches=count_launches(ours, buffers[0]),
        stock_captured=timers["stock"].captured,
        fusedstep_captured=timers["fusedstep"].captured,
        stock_unseeded_captured=(
            timers["stock_unseeded"].captured if "stock_unseeded" in timers else None
        ),
        **asdict(agreement),
        moved_bytes=moved_bytes,
        floor_us=1e6 * moved_bytes / bandwidth,
        logits_mib=buffers.nbytes / (1 << 20),
    )


@dataclass
class Agreement:
    """Counts of outputs; see Row."""

    num_compared: int = 0
    num_tied: int = 0
    num_different: int = 0

    def add(
        self,
        ours: FusedStep,
        logits: torch.Tensor,  # [num_reqs, V]
        turn: int,  # steps before this one
        out: torch.Tensor,  # [num_reqs] our tokens
        ref: torch.Tensor,  # [num_reqs] stock's
        differs: torch.Tensor,  # [num_reqs] bool
    ) -> None:
        from fusedstep.bench.kernels.stock_step import is_tie

        self.num_compared += len(out)
        may_tie = logits.device.type == "cpu"  # elsewhere both sides call the same function
        for row in differs.nonzero()[:, 0].tolist():
            tokens, position = (int(out[row]), int(ref[row])), CONTEXT_LEN - 1 + turn
            if may_tie and is_tie(logits[row], row, position, ours.sampling, tokens):
                self.num_tied += 1
            else:
                self.num_different += 1


def compare(stock: Any, ours: FusedStep, buffers: torch.Tensor) -> Agreement:
    """The outputs of the first steps."""
    stock.rewind()
    ours.rewind()
    num_steps, batch_size, _ = buffers.shape
    agreement = Agreement()
    for turn in range(min(num_steps, math.ceil(COMPARED_TOKENS / batch_size))):
        ref, logprobs, ranks = stock.expected(buffers[turn])
        out, out_logprobs, out_ranks = ours.step(buffers[turn])
        differs = out != ref
        if logprobs is not None:
            assert out_logprobs is not None
            differs |= (out_ranks != ranks) | ((out_logprobs - logprobs).abs() > LOGPROB_TOLERANCE)
        agreement.add(ours, buffers[turn], turn, out, ref, differs)
    return agreement


def make_logits(plan: Plan, batch_size: int, std: float) -> torch.Tensor:
    """Normal logits [num_steps, batch_size, V], the same in each run."""
    buffer_bytes = batch_size * plan.vocab_size * plan.dtype.itemsize
    count = min(math.ceil(BUFFER_BYTES / buffer_bytes), MAX_BUFFERS)
    logits = torch.empty(count, batch_size, plan.vocab_size, dtype=plan.dtype, device=plan.device)
    generator = torch.Generator(plan.device).manual_seed(0)
    for buffer in logits:
        buffer.copy_(std * torch.randn(buffer.shape, device=plan.device, generator=generator))
    return logits
