"""One layer's decode attention, cache write included: vLLM's backends, ours, and the floor.

The floor is the time in which the memory could deliver the keys and values. The layers' caches are
used in turn, in one CUDA graph, and are larger than the GPU's own caches where ``cache_mib`` says
so. Each row has the same context; blocks are scattered over the cache.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from fusedstep.bench.environment import machine
from fusedstep.bench.progress import NO_PROGRESS, Progress
from fusedstep.bench.spread import Spread, Timer, memory_bandwidth
from fusedstep.errors import ConfigError, UnsupportedError
from fusedstep.ops import dispatch
from fusedstep.vllm_plugin.compat import SWITCH

CACHE_BYTES = 128 << 20  # of all layers: more than twice an H100's L2 cache of 50 MB
MAX_LAYERS = 256
MEMORY_SHARE = 0.8  # of the free memory, for caches
BLOCK_SIZE = 16  # vLLM's on a GPU
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Case:
    """A model's attention."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int

    def moved_bytes(self, batch_size: int, context: int, dtype: torch.dtype) -> int:
        """Keys and values of a layer; queries and outputs are left out."""
        return batch_size * context * self.num_kv_heads * 2 * self.head_size * dtype.itemsize


CASES = (
    Case("qwen3-0.6b", 16, 8, 128),
    Case("llama-1b", 32, 8, 64),
    Case("llama-8b", 32, 8, 128),
)


@dataclass(frozen=True)
class Plan:
    """Settings of a measurement."""

    device: torch.device
    cases: tuple[Case, ...]
    batch_sizes: tuple[int, ...]
    contexts: tuple[int, ...]  # tokens of a row, the new one included
    dtype: torch.dtype
    repeats: int


@dataclass(frozen=True)
class Row:
    """One case at one batch size and context; times in microseconds per layer."""

    case: str
    batch_size: int
    context: int
    fusedstep_us: Spread
    triton_us: Spread | None  # vLLM's TRITON_ATTN; None where it does not run
    flash_us: Spread | None  # vLLM's FLASH_ATTN
    flash_version: int | None
    largest_difference: float  # of our output from theirs, where both ran
    differs: bool
    moved_bytes: int
    floor_us: float
    cache_mib: float  # of all layers

    @property
    def triton_ratio(self) -> float | None:
        """TRITON_ATTN's time by ours; None if the outputs differ."""
        return self._ratio(self.triton_us)

    @property
    def flash_ratio(self) -> float | None:
        """FLASH_ATTN's time by ours; None if the outputs differ."""
        return self._ratio(self.flash_us)

    @property
    def gb_per_s(self) -> float:
        return self.moved_bytes / self.fusedstep_us.p50 / 1e3

    @property
    def floor_share(self) -> float:
        """The floor by our time: 1 is as fast as the memory."""
        return self.floor_us / self.fusedstep_us.p50

    def _ratio(self, other: Spread | None) -> float | None:
        return None if other is None or self.differs else other.p50 / self.fusedstep_us.p50


@dataclass(frozen=True)
class Result:
    env: dict[str, Any]
    bandwidth_gb_per_s: float  # see memory_bandwidth
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # what was not measured, and why

    def as_dict(self) -> dict[str, Any]:
        derived = ("triton_ratio", "flash_ratio", "gb_per_s", "floor_share")
        return asdict(self) | {
            "rows": [asdict(row) | {key: getattr(row, key) for key in derived} for row in self.rows]
        }


def pick_cases(names: tuple[str, ...]) -> tuple[Case, ...]:
    """The cases of these names, all without names; ConfigError for an unknown one."""
    known = [case.name for case in CASES]
    for name in names:
        if name not in known:
            raise ConfigError(f"no attention case {name!r}: use {', '.join(known)}")
    return tuple(case for case in CASES if not names or case.name in names)


@torch.inference_mode()
def measure(plan: Plan, progress: Progress = NO_PROGRESS) -> Result:
    """All cases at all batch sizes and contexts; each repeat times every backend once.

    Raises UnsupportedError where Triton cannot run; vLLM's backends are timed where they can.
    """
    choice = dispatch.resolve(plan.device, "triton")
    if choice.name is None:
        raise UnsupportedError(choice.reason)
    os.environ.pop(SWITCH, None)  # vLLM as it comes
    progress.say("measuring the memory bandwidth")
    bandwidth = memory_bandwidth(plan.device)
    env = machine() | {
        "device_type": plan.device.type,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "block_size": BLOCK_SIZE,
        "repeats": plan.repeats,
    }
    result = Result(env, bandwidth / 1e9)
    for case in plan.cases:
        for batch_size in plan.batch_sizes:
            for context in plan.contexts:
                where = f"{case.name}, batch {batch_size}, context {context}"
                progress.say(where)
                needed = case.moved_bytes(batch_size, context, plan.dtype)
                if plan.device.type == "cuda":
                    free = torch.cuda.mem_get_info(plan.device)[0]
                    if needed > MEMORY_SHARE * free:
                        gib = needed / (1 << 30)
                        result.left_out.append(f"{where}: its cache of {gib:.0f} GiB has no room")
                        continue
                result.rows.append(_measure_row(plan, case, batch_size, context, bandwidth))
                progress.keep(result.as_dict())
    return result


class Decode:
    """A layer's inputs; ``step`` attends in the cache of one layer, by one backend."""

    def __init__(self, plan: Plan, case: Case, batch_size: int, context: int) -> None:
        device, blocks = plan.device, math.ceil(context / BLOCK_SIZE)
        generator = torch.Generator(device).manual_seed(0)

        def tokens(heads: int) -> torch.Tensor:
            shape = (batch_size, heads, case.head_size)
            return torch.randn(shape, device=device, generator=generator).to(plan.dtype)

        self.case = case
        self.context = context
        self.query = tokens(case.num_heads)
        self.key, self.value = tokens(case.num_kv_heads), tokens(case.num_kv_heads)
        self.output = torch.empty_like(self.query)
        order = torch.randperm(batch_size * blocks, device=device, generator=generator)
        self.block_table = order.to(torch.int32).view(batch_size, blocks)
        last = self.block_table[:, -1].long()
        self.slots = last * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        self.seq_lens = torch.full((batch_size,), context, dtype=torch.int32, device=device)
        self.starts = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
        self.attend: Callable[[torch.Tensor], Any] = self.fusedstep()

    def rewind(self) -> None:
        """Each step writes the same tokens to the same slots."""

    def fresh(self, cache: torch.Tensor) -> torch.Tensor:
        return cache

    def step(self, cache: torch.Tensor) -> torch.Tensor:
        """Output [batch_size, num_heads, head_size]."""
        self.attend(cache)
        return self.output

    def by(self, attend: Callable[[torch.Tensor], Any]) -> Decode:
        """The same inputs for another backend."""
        other = object.__new__(Decode)
        other.__dict__ |= vars(self) | {"attend": attend}
        return other

    def caches(self, dtype: torch.dtype) -> torch.Tensor:
        """Of all layers: [layers, blocks, heads, tokens, 2 * head_size], tokens before heads."""
        case = self.case
        layer = case.moved_bytes(self.block_table.numel(), BLOCK_SIZE, dtype)
        num_layers = min(math.ceil(CACHE_BYTES / layer), MAX_LAYERS)
        shape = (num_layers, self.block_table.numel(), BLOCK_SIZE, case.num_kv_heads)
        caches = torch.empty(*shape, 2 * case.head_size, dtype=dtype, device=self.query.device)
        caches.normal_(generator=torch.Generator(caches.device).manual_seed(1))
        return caches.transpose(2, 3)

    def fusedstep(self) -> Callable[[torch.Tensor], Any]:
        from fusedstep.ops.attention import AttentionLayer, DecodeAttention

        case = self.case
        scale = case.head_size**-0.5
        layer = AttentionLayer(case.num_heads, case.num_kv_heads, case.head_size, scale)
        attention = DecodeAttention([layer], len(self.seq_lens), self.query.device)

        def attend(cache: torch.Tensor) -> None:
            attention(
                layer,
                self.query,
                self.key,
                self.value,
                cache,
                self.output,
                self.block_table,
                self.seq_lens,
                self.slots,
                self.starts,
                1,
            )

        return attend

    def triton(self) -> Callable[[torch.Tensor], Any]:
        """TRITON_ATTN as its layer calls it, in a CUDA graph of vLLM's sizes."""
        from vllm.v1.attention.backends import triton_attn as vllm

        case, device = self.case, self.query.device
        one = torch.ones((), device=device)
        layer = SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)
        impl = vllm.TritonAttentionImpl(
            case.num_heads,
            case.head_size,
            case.head_size**-0.5,
            case.num_kv_heads,
            None,
            None,
            "auto",
        )
        threshold = vllm.MIN_LAUNCH_GRID_SIZE_2D // case.num_kv_heads
        parts = (threshold, case.num_heads, vllm.NUM_PAR_SOFTMAX_SEGMENTS)
        metadata = vllm.TritonAttentionMetadata(
            num_actual_tokens=len(self.query),
            max_query_len=1,
            query_start_loc=self.starts,
            max_seq_len=self.context,
            seq_lens=self.seq_lens,
            block_table=self.block_table,
            slot_mapping=self.slots,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=vllm.NUM_PAR_SOFTMAX_SEGMENTS,
            softmax_segm_output=torch.empty(*parts, case.head_size, device=device),
            softmax_segm_max=torch.empty(parts, device=device),
            softmax_segm_expsum=torch.empty(parts, device=device),
            causal=True,
        )
        writes_itself = vllm.TritonAttentionBackend.forward_includes_kv_cache_update

        def attend(cache: torch.Tensor) -> None:
            if not writes_itself:
                impl.do_kv_cache_update(layer, self.key, self.value, cache, self.slots)
            impl.forward(layer, self.query, self.key, self.value, cache, metadata, self.output)

        return attend

    def flash(self, version: int) -> Callable[[torch.Tensor], Any]:
        """FLASH_ATTN's calls, with as many splits as vLLM has in CUDA graphs."""
        from vllm._custom_ops import reshape_and_cache_flash
        from vllm.config.attention import AttentionConfig
        from vllm.vllm_flash_attn import flash_attn_interface

        case, size = self.case, self.case.head_size
        one = torch.ones((), device=self.query.device)
        common = {"max_seqlen_q": 1, "max_seqlen_k": self.context, "causal": True}
        splits = AttentionConfig().flash_attn_max_num_splits_for_cuda_graph
        plan = None
        if version == 3:
            plan = flash_attn_interface.get_scheduler_metadata(
                batch_size=len(self.query),
                num_heads_q=case.num_heads,
                num_heads_kv=case.num_kv_heads,
                headdim=size,
                cache_seqlens=self.seq_lens,
                qkv_dtype=self.query.dtype,
                cu_seqlens_q=self.starts,
                page_size=BLOCK_SIZE,
                num_splits=splits,
                **common,
            )

        def attend(cache: torch.Tensor) -> None:
            by_token = cache.transpose(1, 2)
            keys, values = by_token[..., :size], by_token[..., size:]
            reshape_and_cache_flash(
                self.key, self.value, keys, values, self.slots, "auto", one, one
            )
            flash_attn_interface.flash_attn_varlen_func(
                q=self.query,
                k=keys,
                v=values,
                out=self.output,
                cu_seqlens_q=self.starts,
                seqused_k=self.seq_lens,
                softmax_scale=size**-0.5,
                block_table=self.block_table,
                scheduler_metadata=plan,
                fa_version=version,
                num_splits=splits if version == 3 else 0,
                **common,
            )

        return attend


def _baselines(ours: Decode) -> Iterator[tuple[str, Decode]]:
    """Backends that the installed vLLM can run here."""
    if ours.query.device.type != "cuda":
        return
    from vllm.v1.attention.backends import fa_utils

    yield "triton", ours.by(ours.triton())
    version = fa_utils.get_flash_attn_version(head_size=ours.case.head_size)
    if version is not None:
        yield f"flash {version}", ours.by(ours.flash(version))


def _measure_row(plan: Plan, case: Case, batch_size: int, context: int, bandwidth: float) -> Row:
    ours = Decode(plan, case, batch_size, context)
    caches = ours.caches(plan.dtype)
    steps = {"fusedstep": ours, **dict(_baselines(ours))}
    outputs = {name: step.step(caches[0]).clone() for name, step in steps.items()}
    difference = max(
        float((outputs["fusedstep"] - output).abs().max()) for output in outputs.values()
    )
    timers = {name: Timer(step, caches) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(plan.repeats):
        for name, timer in timers.items():
            times[name].append(timer())
    spreads = {name.split()[0]: Spread.of(found) for name, found in times.items()}
    versions = [int(name.split()[1]) for name in steps if name.startswith("flash")]
    moved_bytes = case.moved_bytes(batch_size, context, plan.dtype)
    return Row(
        case=case.name,
        batch_size=batch_size,
        context=context,
        fusedstep_us=spreads["fusedstep"],
        triton_us=spreads.get("triton"),
        flash_us=spreads.get("flash"),
        flash_version=versions[0] if versions else None,
        largest_difference=difference,
        differs=not difference <= TOLERANCE[plan.dtype],
        moved_bytes=moved_bytes,
        floor_us=1e6 * moved_bytes / bandwidth,
        cache_mib=caches.nbytes / (1 << 20),
    )
