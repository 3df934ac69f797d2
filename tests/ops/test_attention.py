"""The decode attention kernel against float64, in caches with NaN wherever nobody may look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ops.attention_world import Rows, make_layer, make_rows
from ops.world import assert_close

from fusedstep.errors import TensorError
from fusedstep.ops.attention import AttentionLayer, DecodeAttention, DeviceLimits
from fusedstep.ops.reference_attention import reference_attention

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = [1, 15, 16, 17, 1000]
Attend = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def _interpreted_bfloat16(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bits of bfloat16 as integers; give it the numbers."""
    if device != "cpu":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    stock = InterpreterBuilder.create_dot

    def as_float32(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return stock(self, as_float32(a), as_float32(b), *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def attend(device: str) -> Attend:
    """Run the kernel on a copy of some rows, hold all it wrote against the reference."""

    def attend(layer: AttentionLayer, rows: Rows, programs: int = 6) -> torch.Tensor:
        out, ref = rows.copy(), rows.copy(torch.float64)
        limits = DeviceLimits(num_sms=programs // 2, shared_bytes=64 << 10)
        attention = DecodeAttention([layer], len(rows.seq_lens), torch.device(device), limits)
        for _ in range(2):  # the second launch finds what the first has left
            attention(layer, *out.arguments())
        reference_attention(layer, *ref.arguments())
        tolerance = TOLERANCE[rows.query.dtype]
        assert_close(
            "output", ref=ref.output, out=out.output.double(), rtol=tolerance, atol=tolerance
        )
        bits = [copy.kv_cache.contiguous().view(torch.uint8) for copy in (out, ref)]
        assert torch.equal(*bits), "the cache"
        return out.output

    return attend


# Chosen so that every two choices of a column meet somewhere near each other, not all of them.
GRID = [
    # heads, KV heads, head size, block size, dtype, heads before tokens in a block
    (2, 2, 64, 16, torch.float32, False),
    (4, 2, 80, 32, torch.float16, True),
    (3, 1, 96, 48, torch.bfloat16, False),
    (8, 2, 128, 128, torch.float32, True),
    (5, 1, 192, 64, torch.float16, False),
    (6, 1, 256, 256, torch.float32, False),
    (7, 1, 64, 256, torch.bfloat16, True),
    (16, 2, 128, 16, torch.float16, False),
]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block_size", "dtype", "heads_first"), GRID, ids=str
)
def test_ragged_rows(
    attend: Attend,
    device: str,
    heads: int,
    kv_heads: int,
    size: int,
    block_size: int,
    dtype: torch.dtype,
    heads_first: bool,
) -> None:
    layer = make_layer(heads, kv_heads, size, device)
    rows = make_rows(
        layer, LENGTHS, device, block_size=block_size, dtype=dtype, heads_first=heads_first
    )
    attend(layer, rows)


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("options", [{}, {"window": 16}, {"sinks": True}], ids=str)
def test_one_row(attend: Attend, device: str, seq_len: int, options: dict[str, Any]) -> None:
    layer = make_layer(2, 1, 64, device, **options)
    attend(layer, make_rows(layer, [seq_len], device))


@pytest.mark.parametrize(
    ("options", "query_len"),
    [
        ({"window": 1}, 1),
        ({"window": 128}, 1),
        ({"window": 129}, 3),
        ({"window": 2}, 4),
        ({"soft_cap": 2.0}, 1),
        ({"soft_cap": 30.0, "window": 300, "sinks": True}, 2),
        ({"alibi": True}, 1),
        ({"alibi": True, "sinks": True}, 2),
        ({"sinks": True}, 1),
        ({"fp8": True}, 1),
        ({"fp8": True, "window": 100, "sinks": True}, 5),
    ],
    ids=str,
)
def test_features(attend: Attend, device: str, options: dict[str, Any], query_len: int) -> None:
    layer = make_layer(4, 2, 64, device, **options)
    seq_lens = [query_len, 131, 128 + query_len, 400]
    attend(layer, make_rows(layer, seq_lens, device, query_len=query_len))


@pytest.mark.parametrize(
    ("options", "size", "dtype", "query_len"),
    [
        ({}, 64, torch.float16, 1),
        ({}, 80, torch.bfloat16, 1),
        ({"window": 100, "sinks": True}, 128, torch.float16, 5),
        ({"soft_cap": 30.0, "alibi": True}, 64, torch.bfloat16, 2),
    ],
    ids=str,
)
def test_fp8_cache_in_pairs(
    attend: Attend,
    device: str,
    options: dict[str, Any],
    size: int,
    dtype: torch.dtype,
    query_len: int,
) -> None:
    """Queries of 16 bits: the cache's bytes are loaded in pairs; not those of a float32 model."""
    layer = make_layer(4, 2, size, device, fp8=True, **options)
    seq_lens = [query_len, 131, 128 + query_len, 400]
    rows = make_rows(layer, seq_lens, device, query_len=query_len, dtype=dtype)
    assert is_paired(layer, rows)
    attend(layer, rows)
    assert not is_paired(layer, make_rows(layer, seq_lens, device, query_len=query_len))


def is_paired(layer: AttentionLayer, rows: Rows) -> bool:
    attention = DecodeAttention([layer], 4, rows.query.device, DeviceLimits(3, 64 << 10))
    return bool(attention.launch(layer, *rows.arguments()).constexprs["PAIRED"])


@pytest.mark.parametrize("factor", [2.0**-6, 2.0**8])
def test_bfloat16_queries_beyond_float16(attend: Attend, device: str, factor: float) -> None:
    """An fp8 cache is multiplied as float16; larger numbers of queries must not be infinite."""
    layer = replace(make_layer(4, 2, 64, device, fp8=True), scale=0.125 / (factor * 500))
    rows = make_rows(layer, [1, 131, 129, 400], device, dtype=torch.bfloat16)
    rows.query.mul_(factor * 500)
    attend(layer, rows)


@pytest.mark.parametrize("query_len", (2, 3, 5, 8))
@pytest.mark.parametrize(("heads", "kv_heads"), ((2, 2), (8, 1)), ids=str)
def test_several_new_tokens(
    attend: Attend, device: str, query_len: int, heads: int, kv_heads: int
) -> None:
    """Also where new tokens lie in two blocks, and where the queries are more than an item's."""
    layer = make_layer(heads, kv_heads, 64, device)
    seq_lens = [query_len, 18, 128 + query_len, 130, 300]
    attend(layer, make_rows(layer, seq_lens, device, query_len=query_len))


def test_rows_of_different_numbers_of_new_tokens(attend: Attend, device: str) -> None:
    """As after drafts were trimmed on the device; a row of none has nothing written."""
    layer = make_layer(8, 2, 64, device, window=140)
    attend(layer, make_rows(layer, [1, 300, 131, 0, 7], device, query_len=[1, 4, 8, 0, 2]))


def test_more_rows_than_a_warp_has_lanes(attend: Attend, device: str) -> None:
    """Of no tokens, of some, of several tiles; a lane counts those of two rows."""
    layer = make_layer(1, 1, 16, device)
    lens = [row % 4 for row in range(35)]
    seq_lens = [(new + 61 * row % 180) * (new > 0) for row, new in enumerate(lens)]
    attend(layer, make_rows(layer, seq_lens, device, query_len=lens))


def test_more_queries_than_an_item_of_large_heads(attend: Attend, device: str) -> None:
    layer = make_layer(9, 1, 256, device)
    attend(layer, make_rows(layer, [2, 200], device, query_len=2, dtype=torch.float16))


def test_padding_rows_are_zeros(attend: Attend, device: str) -> None:
    """Length 0, as the rows after the batch have in a CUDA graph, first, between and last."""
    layer = make_layer(4, 2, 64, device, sinks=True)
    rows = make_rows(layer, [0, 0, 300, 0, 5, 0], device, query_len=2)
    output = attend(layer, rows).view(6, -1)
    assert [bool(row.any()) for row in output] == [False, False, True, False, True, False]


def test_more_tokens_than_rows(attend: Attend, device: str) -> None:
    """A padded batch may have tokens after the last row: nobody touches them."""
    layer = make_layer(2, 1, 64, device)
    rows = make_rows(layer, [3, 20, 7], device)
    rows = Rows(**vars(rows) | {"seq_lens": rows.seq_lens[:2]})
    output = attend(layer, rows)
    assert output[2].isnan().all()


@pytest.mark.parametrize("programs", (2, 14, 60))
def test_the_number_of_programs_does_not_matter(attend: Attend, device: str, programs: int) -> None:
    """Shares of many rows, of parts of one, and programs without any."""
    layer = make_layer(4, 2, 64, device)
    attend(layer, make_rows(layer, [700, 1, 129, 400], device), programs)


def test_launches_after_each_other_are_equal(device: str) -> None:
    """Bit by bit: pieces are merged in their order, and arrivals start from zero."""
    layer = make_layer(2, 1, 64, device)
    rows = make_rows(layer, [900, 300], device)
    attention = DecodeAttention([layer], 2, torch.device(device), DeviceLimits(4, 0))
    outputs = []
    for _ in range(3):
        copy = rows.copy()
        attention(layer, *copy.arguments())
        outputs.append(copy.output)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_one_scratch_for_layers_of_other_shapes(device: str) -> None:
    layers = [make_layer(2, 1, 64, device), make_layer(4, 4, 128, device, window=200)]
    attention = DecodeAttention(layers, 3, torch.device(device), DeviceLimits(3, 0))
    for layer in (*layers, *layers):
        rows = make_rows(layer, [500, 2, 260], device)
        ref = rows.copy(torch.float64)
        attention(layer, *rows.arguments())
        reference_attention(layer, *ref.arguments())
        assert_close("output", ref=ref.output, out=rows.output.double(), rtol=2e-5, atol=2e-5)


def test_a_launch_depends_on_no_length(device: str) -> None:
    """What a CUDA graph keeps: grid, constants, numbers and tensors."""
    layer = make_layer(4, 2, 64, device)
    attention = DecodeAttention([layer], 2, torch.device(device))
    rows = make_rows(layer, [700, 90], device)
    first = attention.launch(layer, *rows.arguments())
    rows.seq_lens.copy_(torch.tensor([2, 300]))
    again = attention.launch(layer, *rows.arguments())
    assert first == again


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query_len": 9}, "query_len: 9, expected 1 to 8"),
        ({"starts": torch.zeros(2, dtype=torch.int32), "query_len": 2}, "starts: 2 numbers"),
        ({"query": torch.zeros(2, 4, 64).double()}, "query: dtype torch.float64"),
        ({"key": torch.zeros(2, 4, 64)}, "key: shape (2, 4, 64), expected [num_tokens, 2, 64]"),
        ({"value": torch.zeros(2, 2, 64).half()}, "value: dtype torch.float16"),
        ({"output": torch.zeros(2, 64, 4).mT}, "output: strides (256, 1, 4)"),
        ({"kv_cache": torch.zeros(9, 16, 2, 128)}, "kv_cache: shape (9, 16, 2, 128)"),
        ({"kv_cache": torch.zeros(9, 2, 16, 64)}, "expected 128 numbers per token"),
        ({"kv_cache": torch.zeros(9, 2, 16, 128).to(torch.float8_e4m3fn)}, "k_scale, v_scale"),
        ({"block_table": torch.zeros(1, 4, dtype=torch.int32)}, "block_table: shape (1, 4)"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int64)}, "seq_lens: dtype torch.int64"),
        ({"seq_lens": torch.zeros(3, dtype=torch.int32)}, "seq_lens: 3 rows, expected 1 to 2"),
        ({"slots": torch.zeros(1, dtype=torch.int64)}, "slots: 1 tokens for 2 rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_tensors_are_named(change: dict[str, Any], words: str) -> None:
    layer = make_layer(4, 2, 64)
    attention = DecodeAttention([layer], 2, torch.device("cpu"))
    rows = Rows(**vars(make_rows(layer, [5, 6])) | change)
    with pytest.raises(TensorError) as error:
        attention(layer, *rows.arguments())
    assert words in str(error.value)
