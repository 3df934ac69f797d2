"""Rows with a paged cache for decode attention: poisoned wherever nobody may look."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedstep.ops.attention import AttentionLayer
from fusedstep.ops.rotation import Rotation

FP8 = torch.float8_e4m3fn
ROTATION = ("norm", "rounded", "dtype", "positions")


@dataclass(frozen=True)
class Rows:
    """The arguments of ``DecodeAttention.__call__`` after the layer, in its order."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor
    output: torch.Tensor  # NaN
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    query_len: int

    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def copy(self, output_dtype: torch.dtype | None = None) -> Rows:
        """With a cache and an output of its own."""
        cache = torch.empty_strided(
            self.kv_cache.shape,
            self.kv_cache.stride(),
            dtype=self.kv_cache.dtype,
            device=self.kv_cache.device,
        ).copy_(self.kv_cache)
        return replace(self, kv_cache=cache, output=self.output.to(output_dtype, copy=True))


def make_layer(
    num_heads: int, num_kv_heads: int, head_size: int, device: str = "cpu", **options: Any
) -> AttentionLayer:
    """``alibi``, ``sinks``, ``fp8``, ``norm`` and ``rounded`` are flags, ``rotary`` is a number of
    dims; the rest are fields of AttentionLayer."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    if options.pop("alibi", False):
        tensors["alibi_slopes"] = 0.3 * torch.rand(num_heads, generator=generator)
    if options.pop("sinks", False):
        tensors["sinks"] = torch.randn(num_heads, generator=generator)
    if options.pop("fp8", False):
        tensors |= {"k_scale": torch.tensor(0.07), "v_scale": torch.tensor([0.03])}
    if rotary := options.pop("rotary", 0):
        options["rotation"] = make_rotation(rotary, head_size, device, **_popped(options))
    return AttentionLayer(
        num_heads,
        num_kv_heads,
        head_size,
        head_size**-0.5,
        **options,
        **{name: tensor.to(device) for name, tensor in tensors.items()},
    )


def make_rotation(
    rotary_dim: int,
    head_size: int,
    device: str = "cpu",
    *,
    norm: bool = False,
    rounded: bool = False,
    dtype: torch.dtype = torch.float32,
    positions: int = 1024,
) -> Rotation:
    """As a model has it: angles that grow with the position, weights of a norm about 1."""
    generator = torch.Generator().manual_seed(4)
    frequencies = 1.0 / 10000 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(positions)[:, None] * frequencies
    weights = [1 + 0.3 * torch.randn(head_size, generator=generator) for _ in range(2)]
    query_norm, key_norm = (weight.to(device, dtype) for weight in weights)
    return Rotation(
        torch.cat([angles.cos(), angles.sin()], dim=1).to(device, dtype),
        query_norm if norm else None,
        key_norm if norm else None,
        epsilon=1e-6,
        rounded=rounded,
    )


def make_rows(
    layer: AttentionLayer,
    seq_lens: list[int],
    device: str = "cpu",
    *,
    query_len: int | list[int] = 1,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    heads_first: bool = False,
    seed: int = 0,
) -> Rows:
    """Rows of these lengths in a cache of permuted blocks, the new tokens not yet in it.

    NaN is in every block that no row has, after each row's tokens, in the slots of the new ones,
    and before what a window shows. Row 1 of more than two writes nowhere (slots of -1).
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows, size = len(seq_lens), layer.head_size
    lens = [query_len] * num_rows if isinstance(query_len, int) else query_len
    starts = [sum(lens[:row]) for row in range(num_rows + 1)]
    counts = [-(-seq_len // block_size) for seq_len in seq_lens]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks, generator=generator)
    block_table = torch.full((num_rows, max(counts) + 2), 2**30, dtype=torch.int32)
    cache = torch.full((num_blocks, layer.num_kv_heads, block_size, 2 * size), torch.nan)
    slots = torch.full((starts[-1],), -1)
    for row, seq_len in enumerate(seq_lens):
        blocks = order[sum(counts[:row]) :][: counts[row]]
        block_table[row, : counts[row]] = blocks
        context = max(seq_len - lens[row], 0)
        first = max(context - layer.window + 1, 0) if layer.window else 0
        positions = torch.arange(first, context)
        shape = (len(positions), layer.num_kv_heads, 2 * size)
        states = torch.randn(shape, generator=generator) * _spread(layer)
        cache[blocks[positions // block_size], :, positions % block_size] = states
        if seq_len and not (row == 1 and num_rows > 2):
            new = torch.arange(context, seq_len)
            slots[starts[row] : starts[row + 1]] = (
                blocks[new // block_size] * block_size + new % block_size
            )

    def tokens(heads: int, room: int) -> torch.Tensor:
        """With a gap between tokens, as slices of a fused projection have."""
        shape = (starts[-1], heads, size + room)
        return torch.randn(shape, generator=generator)[..., :size].to(device, dtype)

    if not heads_first:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    query, key, value = (
        tokens(heads, room)
        for heads, room in ((layer.num_heads, 8), (layer.num_kv_heads, 0), (layer.num_kv_heads, 16))
    )
    if layer.k_scale is not None and layer.v_scale is not None:
        key.copy_(_to_quantise(key, layer.k_scale))
        value.copy_(_to_quantise(value, layer.v_scale))
    return Rows(
        query=query,
        key=key,
        value=value,
        kv_cache=cache.to(device, FP8 if layer.k_scale is not None else dtype),
        output=torch.full_like(query, torch.nan),
        block_table=block_table.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        slots=slots.to(device),
        starts=torch.tensor(starts, dtype=torch.int32, device=device),
        query_len=max(lens),
    )


def _to_quantise(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """New keys or values that an fp8 cache changes, some far beyond its largest number.

    2 % above a number of fp8: Triton's interpreter rounds others to wrong ones (a carry out of
    the mantissa is lost).
    """
    numbers = 1.02 * (200 * states).clamp(-448, 448).to(FP8).float()
    return (scale * torch.where(numbers.abs() > 448, 3 * numbers, numbers)).to(states.dtype)


def _popped(options: dict[str, Any]) -> dict[str, Any]:
    """What is a rotation's of the options of a layer."""
    return {name: options.pop(name) for name in ROTATION if name in options}


def _spread(layer: AttentionLayer) -> float:
    """Standard deviation of what the cache holds."""
    return 12.0 if layer.k_scale is not None else 1.0
