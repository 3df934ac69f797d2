"""Decode attention as one Triton launch: reads a paged KV cache and writes the new tokens to it.

The launch depends on shapes and on ``DeviceLimits`` only, never on a length: it can be captured in
a CUDA graph and replayed while ``seq_lens``, the block table and the slots change. On CPU tensors
it runs in Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusedstep.errors import TensorError
from fusedstep.kernels.attention import attend_kernel
from fusedstep.ops.launch import Launch
from fusedstep.ops.rotation import NO_ROTATION, Rotation

MAX_QUERY_LEN = 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 224.0}  # vLLM's get_fp8_min_max
MIN_BLOCK_M = 16  # of tl.dot
MIN_SHARE = 128  # tokens: smaller pieces cost more to merge than they save
OTHER_BYTES = 8 << 10  # of shared memory, for everything but tiles
MAX_IN_FLIGHT = 6  # tiles
MERGE_NUMBERS = 8192  # that a merge holds in registers
PROGRAMS_PER_SM = 2
MAX_REGISTERS = 255  # of a thread: with 4 warps, PROGRAMS_PER_SM fit


@dataclass(frozen=True)
class DeviceLimits:
    """Properties of the GPU that choose grid and tile sizes."""

    num_sms: int
    shared_bytes: int  # of a program, where PROGRAMS_PER_SM of them share an SM
    is_hip: bool = False

    @classmethod
    def of(cls, device: torch.device) -> DeviceLimits:
        """Of a CUDA or ROCm device; the interpreter gets few programs, as each takes its time."""
        if device.type == "cpu":
            return cls(num_sms=2, shared_bytes=0)
        found = torch.cuda.get_device_properties(device)
        is_hip = torch.version.hip is not None
        if is_hip:
            shared = found.shared_memory_per_block
        else:
            shared = found.shared_memory_per_multiprocessor // PROGRAMS_PER_SM - 1024
        return cls(found.multi_processor_count, shared, is_hip)

    @property
    def num_programs(self) -> int:
        return PROGRAMS_PER_SM * self.num_sms


@dataclass(frozen=True)
class AttentionLayer:
    """Constants of a layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float  # of the scores
    window: int = 0  # tokens that a query sees, itself included; 0: all
    soft_cap: float = 0.0  # 0: none
    alibi_slopes: torch.Tensor | None = None  # [num_heads] float32
    sinks: torch.Tensor | None = None  # [num_heads] any float
    k_scale: torch.Tensor | None = None  # [] or [1] float32: of an fp8 cache
    v_scale: torch.Tensor | None = None
    rotation: Rotation | None = None  # of queries and new keys; None: they come rotated

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def dims(self) -> int:
        """The head size up to a power of two."""
        return max(_power_of_two(self.head_size), 16)


@dataclass(frozen=True)
class PipelinedLaunch(Launch):
    """A launch whose loops load tiles ahead."""

    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """Compiler options on this machine's kind of GPU."""
        return super().options | {"num_stages": self.num_stages}


class _Tokens(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


class _Rows(NamedTuple):
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor


class _Layer(NamedTuple):
    alibi_slopes: torch.Tensor
    sinks: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor


class _Strides(NamedTuple):
    """In elements."""

    query: tuple[int, ...]  # of a token, of a head
    key: tuple[int, ...]
    value: tuple[int, ...]
    output: tuple[int, ...]
    cache: tuple[int, ...]  # of a block, of a head, of a token
    block_table: int


class _Scratch(NamedTuple):
    """Scratch: every program of an item writes its piece, the last one to arrive reads them all."""

    arrivals: torch.Tensor  # [max items] int32, zero between launches
    piece_max: torch.Tensor  # [2 * num_programs * max block_m] float32
    weights: torch.Tensor
    sums: torch.Tensor  # [2 * num_programs * max (block_m * dims)] float32


class _Tiling(NamedTuple):
    block_m: int  # queries of an item
    m_blocks: int
    tile: int  # tokens
    num_warps: int
    num_stages: int
    new_first: bool  # the order of the loads that needs fewer registers


class DecodeAttention:
    """Attention of layers that run one after the other, with scratch of its own.

    ``max_num_rows`` bounds the rows of a launch, ``layers`` their heads and head sizes.
    """

    def __init__(
        self,
        layers: Iterable[AttentionLayer],
        max_num_rows: int,
        device: torch.device,
        limits: DeviceLimits | None = None,
    ) -> None:
        self._device = device
        self._max_num_rows = max_num_rows
        self._limits = limits or DeviceLimits.of(device)
        items = queries = numbers = 0
        for layer in layers:
            for query_len in range(1, MAX_QUERY_LEN + 1):
                for dtype in DTYPES:
                    block_m, m_blocks = _query_blocks(layer, query_len, dtype)
                    items = max(items, max_num_rows * layer.num_kv_heads * m_blocks)
                    queries = max(queries, block_m)
                    numbers = max(numbers, block_m * layer.dims)
        pieces = 2 * self._limits.num_programs

        def floats(size: int) -> torch.Tensor:
            return torch.zeros(pieces * size, device=device)

        arrivals = torch.zeros(items, dtype=torch.int32, device=device)
        self._scratch = _Scratch(arrivals, floats(queries), floats(queries), floats(numbers))

    def __call__(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        output: torch.Tensor,  # [num_tokens, num_heads, head_size]
        block_table: torch.Tensor,  # [num_rows, max_num_blocks] int32
        seq_lens: torch.Tensor,  # [num_rows] int32, the new tokens included
        slots: torch.Tensor,  # [num_tokens] int64, -1: do not write
        starts: torch.Tensor,  # [num_rows + 1] int32: row i's new tokens are starts[i : i + 2]
        query_len: int,
    ) -> None:
        """Write the rows' new keys and values to their slots and the attention to ``output``.

        No row has more than ``query_len`` new tokens. If that is 1, row i's is token i, and
        ``starts`` is not read. A row of length 0 gets zeros; tokens of no row are left alone. All
        but the last dimension of the float tensors may have any stride. The cache is of the query's
        dtype, or of a float8 dtype: then the layer has scales, and the new tokens take part as they
        are after quantising. With a ``rotation`` queries and new keys are normed and rotated first.

        Raises:
            TensorError: a shape, dtype or stride that the kernel is not made for.
        """
        self.launch(
            layer,
            query,
            key,
            value,
            kv_cache,
            output,
            block_table,
            seq_lens,
            slots,
            starts,
            query_len,
        )()

    def launch(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        query_len: int,
    ) -> Launch:
        """The kernel that a call launches."""
        tokens = _Tokens(query, key, value, output)
        rows = _Rows(block_table, seq_lens, slots, starts)
        num_rows = seq_lens.shape[0]
        if not 1 <= query_len <= MAX_QUERY_LEN:
            raise TensorError(f"query_len: {query_len}, expected 1 to {MAX_QUERY_LEN}")
        if not 1 <= num_rows <= self._max_num_rows:
            raise TensorError(f"seq_lens: {num_rows} rows, expected 1 to {self._max_num_rows}")
        _check(layer, tokens, kv_cache, rows, query_len)
        tiling = _tiling(layer, query.dtype, kv_cache.dtype, query_len, self._limits)
        unused = seq_lens
        scales = (layer.k_scale, layer.v_scale)
        args = {
            "tokens": tokens,
            "cache_ptr": kv_cache,
            "rows": rows,
            "layer": _Layer(
                *(
                    unused if tensor is None else tensor
                    for tensor in (layer.alibi_slopes, layer.sinks, *scales)
                )
            ),
            "rotation": None if layer.rotation is None else layer.rotation.args,
            "scratch": self._scratch,
            "strides": _Strides(
                query=query.stride()[:2],
                key=key.stride()[:2],
                value=value.stride()[:2],
                output=output.stride()[:2],
                cache=kv_cache.stride()[:3],
                block_table=block_table.stride(0),
            ),
            "num_rows": num_rows,
            "scale": float(layer.scale),
            "soft_cap": float(layer.soft_cap),
        }
        padded_rows = _power_of_two(num_rows)
        chunk_m = max(min(MERGE_NUMBERS // (16 * layer.dims), tiling.block_m), 1)
        constexprs = {
            "HEAD_SIZE": layer.head_size,
            "DIMS": layer.dims,
            "GROUP": layer.group,
            "NUM_KV_HEADS": layer.num_kv_heads,
            "QUERY_LEN": query_len,
            "BLOCK_SIZE": kv_cache.shape[2],
            "WINDOW": layer.window,
            "SOFT_CAP": layer.soft_cap > 0,
            "ALIBI": layer.alibi_slopes is not None,
            "SINKS": layer.sinks is not None,
            "FP8_MAX": FP8_MAX.get(kv_cache.dtype, 0.0),
            "PRECISION": "ieee",
            "ROWS": padded_rows,
            "LANES": min(padded_rows, max(32, padded_rows // 8)),
            "BLOCK_M": tiling.block_m,
            "M_BLOCKS": tiling.m_blocks,
            "TILE": tiling.tile,
            "NEW_FIRST": tiling.new_first,
            "PAIRED": _is_paired(query.dtype, kv_cache, self._limits),
            "MIN_TILES": max(MIN_SHARE // tiling.tile, 1),
            "CHUNK": 16,
            "CHUNK_M": chunk_m,
        }
        constexprs |= NO_ROTATION if layer.rotation is None else layer.rotation.constexprs
        return PipelinedLaunch(
            attend_kernel,
            (self._limits.num_programs,),
            args,
            constexprs,
            num_warps=tiling.num_warps,
            max_registers=MAX_REGISTERS,
            num_stages=tiling.num_stages,
        )


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` >= 1."""
    return 1 << (n - 1).bit_length()


def _is_paired(dtype: torch.dtype, kv_cache: torch.Tensor, limits: DeviceLimits) -> bool:
    """May tiles of this cache be loaded as pairs of dims? float16 holds e4m3, not float32."""
    is_fp8 = kv_cache.dtype == torch.float8_e4m3fn and not limits.is_hip
    in_pairs = (*kv_cache.stride()[:3], kv_cache.shape[3] // 2, kv_cache.data_ptr())
    return is_fp8 and dtype.itemsize == 2 and not any(number % 2 for number in in_pairs)


def _query_blocks(layer: AttentionLayer, query_len: int, dtype: torch.dtype) -> tuple[int, int]:
    """Queries of an item, and items of a KV head: large numbers leave fewer registers."""
    num_queries = query_len * layer.group
    most = 16 if dtype.itemsize == 4 or layer.dims > 128 else 32
    block_m = min(max(_power_of_two(num_queries), MIN_BLOCK_M), most)
    return block_m, -(-num_queries // block_m)


def _tiling(
    layer: AttentionLayer,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    query_len: int,
    limits: DeviceLimits,
) -> _Tiling:
    """Tiles that stay in the registers, and as many in flight as the shared memory holds."""
    block_m, m_blocks = _query_blocks(layer, query_len, dtype)
    large = block_m > MIN_BLOCK_M and layer.dims > 64
    if cache_dtype.itemsize == 4 or layer.dims > 256:
        tile = 16
    elif layer.dims == 256:
        tile = 32 // cache_dtype.itemsize
    else:
        tile = min(8192 // layer.dims, 128) * MIN_BLOCK_M // block_m
    stage_bytes = 2 * tile * layer.dims * cache_dtype.itemsize
    in_flight = min((limits.shared_bytes - OTHER_BYTES) // stage_bytes, MAX_IN_FLIGHT)
    num_stages = 2 if limits.is_hip else 1 + max(in_flight, 1)
    # Without tensor cores a product takes more registers; of heads of 256 it has too few for the
    # faster order.
    num_warps = 8 if large or (dtype.itemsize == 4 and layer.dims > 64) else 4
    new_first = dtype.itemsize == 4 and layer.dims > 128
    return _Tiling(block_m, m_blocks, tile, num_warps, num_stages, new_first)


def _check(
    layer: AttentionLayer,
    tokens: _Tokens,
    kv_cache: torch.Tensor,
    rows: _Rows,
    query_len: int,
) -> None:
    dtype, num_rows = tokens.query.dtype, rows.seq_lens.shape[0]
    if layer.rotation is not None:
        layer.rotation.check(layer.head_size)
    if dtype not in DTYPES:
        raise TensorError(f"query: dtype {dtype}, expected one of {DTYPES}")
    for name, tensor in tokens._asdict().items():
        heads = layer.num_heads if name in ("query", "output") else layer.num_kv_heads
        if tensor.dim() != 3 or tensor.shape[1:] != (heads, layer.head_size):
            expected = f"[num_tokens, {heads}, {layer.head_size}]"
            raise TensorError(f"{name}: shape {tuple(tensor.shape)}, expected {expected}")
        if query_len == 1 and tensor.shape[0] < num_rows:
            raise TensorError(f"{name}: {tensor.shape[0]} tokens for {num_rows} rows")
        _check_tensor(name, tensor, (dtype,))
    if kv_cache.dim() != 4 or kv_cache.shape[1] != layer.num_kv_heads:
        raise TensorError(
            f"kv_cache: shape {tuple(kv_cache.shape)}, expected "
            f"[num_blocks, {layer.num_kv_heads}, block_size, {2 * layer.head_size}]"
        )
    if kv_cache.shape[3] != 2 * layer.head_size:
        expected = f"{2 * layer.head_size} numbers per token"
        raise TensorError(f"kv_cache: shape {tuple(kv_cache.shape)}, expected {expected}")
    _check_tensor("kv_cache", kv_cache, (dtype, *FP8_MAX))
    if kv_cache.dtype in FP8_MAX and (layer.k_scale is None or layer.v_scale is None):
        raise TensorError("k_scale, v_scale: none, expected those of a float8 cache")
    if rows.block_table.dim() != 2 or rows.block_table.shape[0] < num_rows:
        shape = tuple(rows.block_table.shape)
        raise TensorError(f"block_table: shape {shape}, expected [{num_rows}, max_num_blocks]")
    if query_len == 1 and rows.slots.shape[0] < num_rows:
        raise TensorError(f"slots: {rows.slots.shape[0]} tokens for {num_rows} rows")
    if query_len > 1 and rows.starts.shape[0] <= num_rows:
        raise TensorError(f"starts: {rows.starts.shape[0]} numbers, expected {num_rows + 1}")
    _check_tensor("block_table", rows.block_table, (torch.int32,))
    _check_tensor("seq_lens", rows.seq_lens, (torch.int32,))
    _check_tensor("starts", rows.starts, (torch.int32,))
    _check_tensor("slots", rows.slots, (torch.int32, torch.int64))


def _check_tensor(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise TensorError(f"{name}: dtype {tensor.dtype}, expected one of {dtypes}")
    if tensor.stride(-1) != 1:
        raise TensorError(f"{name}: strides {tensor.stride()}, expected 1 in the last dimension")
