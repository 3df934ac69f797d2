"""Decode attention in plain torch, in float64: the truth that the kernel is held against."""

from __future__ import annotations

import torch

from fusedstep.ops.attention import FP8_MAX, AttentionLayer
from fusedstep.ops.rotation import Rotation


def reference_attention(
    layer: AttentionLayer,
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    output: torch.Tensor,  # [num_tokens, num_heads, head_size]
    block_table: torch.Tensor,  # [num_rows, max_num_blocks] int32
    seq_lens: torch.Tensor,  # [num_rows] int32
    slots: torch.Tensor,  # [num_tokens] int64
    starts: torch.Tensor,  # [num_rows + 1] int32
    query_len: int,  # not used: starts says it
) -> None:
    """See ``DecodeAttention.__call__``; rows of any number of new tokens, ``output`` float64."""
    size, block_size = layer.head_size, kv_cache.shape[2]
    if layer.rotation is not None:
        query, key = reference_rotate(layer.rotation, query, key, seq_lens, starts)
    for row, seq_len in enumerate(seq_lens.tolist()):
        tokens = slice(*starts[row : row + 2].tolist())
        if seq_len == 0:
            output[tokens] = 0
            continue
        new = torch.cat([key[tokens], value[tokens]], dim=-1)  # [query_len, heads, 2 * size]
        new = _as_cached(new, layer, kv_cache.dtype)
        context = seq_len - (tokens.stop - tokens.start)
        positions = torch.arange(seq_len)
        first_seen = max(context - layer.window + 1, 0) if layer.window else 0
        cached = positions[first_seen:context].to(kv_cache.device)
        blocks = block_table[row][cached // block_size].long()
        old = kv_cache[blocks, :, cached % block_size]
        states = _numbers(torch.cat([_numbers(old), _numbers(new)]), layer, kv_cache.dtype)
        keys, values = states[..., :size], states[..., size:]
        seen_at = positions[first_seen:].to(query.device)
        for number, token in enumerate(range(tokens.start, tokens.stop)):
            position = context + number
            seen = seen_at <= position
            if layer.window:
                seen &= position - seen_at < layer.window
            output[token] = _attend(
                layer, query[token].double(), keys[seen], values[seen], seen_at[seen] - context
            )
        for number, slot in enumerate(slots[tokens].tolist()):
            if slot >= 0:
                kv_cache[slot // block_size, :, slot % block_size] = new[number]


def reference_rotate(
    rotation: Rotation,
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    seq_lens: torch.Tensor,  # [num_rows] int32
    starts: torch.Tensor,  # [num_rows + 1] int32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows of any number of new tokens; rounded where vLLM rounds, exact in between."""
    positions = torch.zeros(query.shape[0], dtype=torch.int64)
    for row, seq_len in enumerate(seq_lens.tolist()):
        first, end = starts[row : row + 2].tolist()
        new = torch.arange(first, end)
        positions[new] = (seq_len - end + new).clamp(min=0)
    cos, sin = rotation.cos_sin.double()[positions.to(query.device)][:, None].chunk(2, dim=-1)

    def rotated(states: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        exact = states.double()
        if weight is not None:
            variance = exact.square().mean(dim=-1, keepdim=True)
            exact = exact * (variance + rotation.epsilon).rsqrt()
            if rotation.rounded:
                exact = (exact.to(states.dtype).double() * weight.double()).to(states.dtype)
                exact = exact.double()
            else:
                exact = exact * weight.double()
        turned = exact[..., : rotation.rotary_dim]
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([turned, exact[..., rotation.rotary_dim :]], dim=-1).to(states.dtype)

    return rotated(query, rotation.query_norm), rotated(key, rotation.key_norm)


def _attend(
    layer: AttentionLayer,
    query: torch.Tensor,  # [num_heads, head_size] float64
    keys: torch.Tensor,  # [n, num_kv_heads, head_size] float64
    values: torch.Tensor,
    distances: torch.Tensor,  # [n] from the first new token on
) -> torch.Tensor:
    keys = keys.repeat_interleave(layer.group, dim=1)
    values = values.repeat_interleave(layer.group, dim=1)
    scores = layer.scale * torch.einsum("hd,nhd->hn", query, keys)
    if layer.soft_cap:
        scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
    if layer.alibi_slopes is not None:
        scores = scores + layer.alibi_slopes.double()[:, None] * distances
    if layer.sinks is not None:
        scores = torch.cat([scores, layer.sinks.double()[:, None]], dim=1)
    weights = scores.softmax(dim=1)[:, : len(keys)]
    return torch.einsum("hn,nhd->hd", weights, values)


def _as_cached(states: torch.Tensor, layer: AttentionLayer, dtype: torch.dtype) -> torch.Tensor:
    """Keys and values [n, heads, 2 * size] in the cache's dtype."""
    if dtype not in FP8_MAX:
        return states.to(dtype)
    scaled = states.float() / _scales(layer, states.device)
    return scaled.clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype)


def _numbers(
    states: torch.Tensor, layer: AttentionLayer | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Float64 of what the cache holds; with a layer, times the scales of an fp8 cache."""
    if layer is None or dtype not in FP8_MAX:
        return states.double()
    return states.double() * _scales(layer, states.device)


def _scales(layer: AttentionLayer, device: torch.device) -> torch.Tensor:
    """[2 * head_size] float32."""
    assert layer.k_scale is not None and layer.v_scale is not None
    return torch.cat(
        [scale.reshape(1).expand(layer.head_size) for scale in (layer.k_scale, layer.v_scale)]
    ).to(device)
