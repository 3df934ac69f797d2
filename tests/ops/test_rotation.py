"""Norm of heads and rotary embedding, in decode attention and alone, against float64 and vLLM's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ops.attention_world import Rows, make_layer, make_rotation, make_rows
from ops.world import assert_close

from fusedstep.errors import TensorError
from fusedstep.ops.attention import AttentionLayer, DecodeAttention, DeviceLimits
from fusedstep.ops.reference_attention import reference_attention, reference_rotate
from fusedstep.ops.rotation import Rotation, rotate

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MOST_ROUNDED_OTHERWISE = 0.002  # of the numbers: one that lies between two of its dtype
POSITIONS = [3, 300, 12, 0, 131]
NEW_TOKENS = [1, 4, 8, 0, 2]


def attend(layer: AttentionLayer, rows: Rows) -> Rows:
    """What the kernel makes of a copy of these rows."""
    out = rows.copy()
    limits = DeviceLimits(num_sms=3, shared_bytes=64 << 10)
    device = rows.query.device
    DecodeAttention([layer], len(rows.seq_lens), device, limits)(layer, *out.arguments())
    return out


def attended(layer: AttentionLayer, rows: Rows) -> Rows:
    """The same by the reference."""
    ref = rows.copy(torch.float64)
    reference_attention(layer, *ref.arguments())
    return ref


def compare(out: Rows, ref: Rows) -> None:
    """Attention and cache; NaN where nobody has written."""
    dtype = out.query.dtype
    limit = TOLERANCE[dtype]
    assert_close("output", ref=ref.output, out=out.output.double(), rtol=limit, atol=limit)
    assert torch.equal(out.kv_cache.isnan(), ref.kv_cache.isnan())
    same(out.kv_cache.float().nan_to_num(), ref.kv_cache.float().nan_to_num(), dtype)


def same(
    out: torch.Tensor, ref: torch.Tensor, dtype: torch.dtype, interpreted: bool = False
) -> None:
    """But for the last bit of a few numbers; of float32's, whose sums differ, of any. Triton's
    interpreter does not round to bfloat16, it cuts off."""
    cuts_off = dtype == torch.bfloat16 and interpreted
    limit = {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    limit *= 3 if cuts_off else 1
    torch.testing.assert_close(out.float(), ref.float(), rtol=limit, atol=limit)
    if dtype != torch.float32 and not cuts_off:
        assert (out != ref).float().mean() <= MOST_ROUNDED_OTHERWISE


GRID: list[tuple[int, int, int, torch.dtype, dict[str, Any]]] = [
    # heads, KV heads, head size, dtype, rotation
    (2, 2, 64, torch.float32, {"rotary": 64}),
    (8, 2, 128, torch.float32, {"rotary": 128, "norm": True}),
    (9, 3, 64, torch.float16, {"rotary": 64}),
    (8, 1, 128, torch.float16, {"rotary": 128, "norm": True, "rounded": True}),
    (4, 2, 128, torch.float16, {"rotary": 128, "norm": True}),
    (6, 2, 96, torch.float32, {"rotary": 48, "norm": True}),
    (5, 1, 80, torch.float16, {"rotary": 32}),
    (16, 2, 32, torch.float32, {"rotary": 8, "norm": True}),
]


@pytest.mark.parametrize(("heads", "kv_heads", "size", "dtype", "rotation"), GRID, ids=str)
def test_ragged_rows(
    device: str,
    heads: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype,
    rotation: dict[str, Any],
) -> None:
    """One new token each, then 1 to 8 and a row of none: a whole head or a part of it."""
    layer = make_layer(heads, kv_heads, size, device, **rotation, dtype=dtype)
    for new in (1, NEW_TOKENS):
        rows = make_rows(layer, POSITIONS, device, query_len=new, dtype=dtype)
        compare(attend(layer, rows), attended(layer, rows))


@pytest.mark.parametrize(
    ("options", "query_len"),
    [
        ({"window": 100, "sinks": True}, 3),
        ({"soft_cap": 30.0}, 1),
        ({"fp8": True}, 1),
    ],
    ids=str,
)
def test_with_other_features(device: str, options: dict[str, Any], query_len: int) -> None:
    layer = make_layer(4, 2, 64, device, rotary=64, norm=True, **options)
    rows = make_rows(layer, [query_len, 131, 400], device, query_len=query_len)
    out, ref = attend(layer, rows), attended(layer, rows)
    if options.get("fp8"):  # a number between two of the cache's goes either way
        assert_close("output", ref=ref.output, out=out.output.double(), rtol=0.05, atol=0.05)
        differs = out.kv_cache.view(torch.uint8) != ref.kv_cache.view(torch.uint8)
        assert differs[..., 64:].sum() == 0, "values"
        return
    compare(out, ref)


def test_padding_rows_are_zeros(device: str) -> None:
    layer = make_layer(4, 2, 64, device, rotary=64, norm=True)
    rows = make_rows(layer, [0, 0, 300, 0, 5, 0], device, query_len=2)
    out = attend(layer, rows)
    compare(out, attended(layer, rows))
    tokens = out.output.view(6, -1)
    assert [bool(row.any()) for row in tokens] == [False, False, True, False, True, False]


def test_many_pieces_of_one_row(device: str) -> None:
    """Each program rotates the row's query; the last one its key."""
    layer = make_layer(2, 1, 64, device, rotary=64, norm=True)
    rows = make_rows(layer, [900], device)
    compare(attend(layer, rows), attended(layer, rows))


FAULTS = {
    "a position too far": lambda r: replace(r, cos_sin=r.cos_sin.roll(-1, 0)),
    "turned back": lambda r: replace(r, cos_sin=torch.cat([*_halves(r)], dim=1)),
    "no norm": lambda r: replace(r, query_norm=None, key_norm=None),
    "norms exchanged": lambda r: replace(r, query_norm=r.key_norm, key_norm=r.query_norm),
    "another epsilon": lambda r: replace(r, epsilon=1e-2),
}


def _halves(rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotation.cos_sin.chunk(2, dim=1)
    return cos, -sin


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_fault(device: str, fault: str) -> None:
    layer = make_layer(4, 2, 64, device, rotary=32, norm=True)
    assert layer.rotation is not None
    wrong = replace(layer, rotation=FAULTS[fault](layer.rotation))
    rows = make_rows(layer, POSITIONS, device, query_len=NEW_TOKENS)
    ref = attended(layer, rows)
    with pytest.raises(AssertionError):
        compare(attend(wrong, rows), ref)
    out = rotate(wrong.rotation, rows.query, rows.key, rows.seq_lens, rows.starts)
    right = reference_rotate(layer.rotation, rows.query, rows.key, rows.seq_lens, rows.starts)
    for states, expected in zip(out, right, strict=True):
        with pytest.raises(AssertionError):
            same(states, expected, rows.query.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rotation",
    [
        {"rotary": 64},
        {"rotary": 64, "norm": True},
        {"rotary": 20, "norm": True, "rounded": True},
    ],
    ids=str,
)
def test_any_batch(device: str, dtype: torch.dtype, rotation: dict[str, Any]) -> None:
    """Prefills of any length between decodes and rows of no tokens; as many as fill programs."""
    layer = make_layer(3, 1, 64, device, **rotation, dtype=dtype)
    assert layer.rotation is not None
    rows = make_rows(
        layer, [0, 77, 3, 200, 9, 0], device, query_len=[0, 77, 1, 30, 9, 0], dtype=dtype
    )
    tensors = rows.query, rows.key, rows.seq_lens, rows.starts
    out = rotate(layer.rotation, *tensors)
    for states, expected in zip(out, reference_rotate(layer.rotation, *tensors), strict=True):
        same(states, expected, dtype, interpreted=device == "cpu")


def test_tokens_of_no_row_are_left_alone(device: str) -> None:
    """A padded batch has some after the last row."""
    layer = make_layer(2, 1, 64, device, rotary=64)
    rows = make_rows(layer, [5, 9, 7], device, query_len=[5, 2, 7])
    from fusedstep.ops.rotation import rotate_launch

    assert layer.rotation is not None
    rotated = [torch.full_like(tensor, torch.nan) for tensor in (rows.query, rows.key)]
    tensors = (rows.query, rows.key, rows.seq_lens[:2], rows.starts[:3])
    rotate_launch(layer.rotation, *tensors, *rotated)()
    for states in rotated:
        assert states[7:].isnan().all() and not states[:7].isnan().any()


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_reference_is_vllms(dtype: torch.dtype, rounded: bool) -> None:
    """RMSNorm as ``ir.ops.rms_norm`` defines it, rounded or as Inductor joins it with what
    follows; the rotation in float32, as vLLM's CUDA kernel and Inductor compute it."""
    pytest.importorskip("vllm")
    from vllm import ir
    from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

    rotation = make_rotation(128, 128, norm=True, rounded=rounded, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(40, n, 128, generator=generator).to(dtype) for n in (4, 2))
    seq_lens = torch.tensor([140], dtype=torch.int32)
    starts = torch.tensor([0, 40], dtype=torch.int32)
    ref = reference_rotate(rotation, query, key, seq_lens, starts)
    cos, sin = rotation.cos_sin[100:140].chunk(2, dim=1)
    norms = (rotation.query_norm, rotation.key_norm)
    for states, weight, expected in zip((query, key), norms, ref, strict=True):
        assert weight is not None
        if not rounded:
            states, weight = states.float(), weight.float()
        normed = ir.ops.rms_norm(states, weight, rotation.epsilon, None)
        turned = ApplyRotaryEmb.forward_static(normed, cos, sin, enable_fp32_compute=True)
        same(expected, turned.to(dtype), dtype)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cos_sin": torch.zeros(9, 66)}, "cos_sin: shape (9, 66), expected [positions, an even"),
        ({"cos_sin": torch.zeros(9, 5)}, "cos_sin: shape (9, 5)"),
        ({"cos_sin": torch.zeros(8, 9).mT}, "cos_sin: strides (1, 9)"),
        ({"key_norm": torch.ones(64)}, "query_norm, key_norm: one of them"),
        ({"key_norm": torch.ones(32), "query_norm": torch.ones(32)}, "query_norm: shape (32,)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_tensors_are_named(change: dict[str, Any], words: str) -> None:
    layer = make_layer(4, 2, 64, rotary=32)
    assert layer.rotation is not None
    layer = replace(layer, rotation=replace(layer.rotation, **change))
    rows = make_rows(layer, [5, 6])
    with pytest.raises(TensorError) as error:
        attend(layer, rows)
    assert words in str(error.value)


def test_large_heads_are_refused() -> None:
    layer = make_layer(2, 1, 192, rotary=64)
    with pytest.raises(TensorError, match="heads of 192, expected up to 128"):
        attend(layer, make_rows(layer, [5]))
