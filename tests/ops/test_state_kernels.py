"""Native stand-ins for kernels of recurrent state and KV blocks, against vLLM's, interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.interpret_stock import results_of

from fusedstep.vllm_plugin.cpu.state_kernels import STAND_INS

Case = tuple[str, tuple[int, ...], list[Any], dict[str, Any]]
R, BLOCKS, BLOCK_SIZE, TILES = 6, 12, 8, 4
WIDTH, DIM = 3, 5  # of a convolution: tokens that it looks back at, channels


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def idx_mapping(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def zero_blocks() -> Case:
    """Two segments: one with gaps between its blocks."""
    segments = [torch.randint(1, 99, (BLOCKS, 7), dtype=torch.int32) for _ in range(2)]
    args = [
        ("pointers", segments),
        torch.tensor([7, 7]),
        torch.tensor([7, 4]),
        torch.tensor([3, 1, 11]),
    ]
    return "utils._zero_kv_blocks_kernel", (3, 2, 2), args, {"BLOCK_SIZE": 4}


def preprocess() -> Case:
    """A first chunk, one within a block, across a boundary, a decode that begins a block."""
    args = [
        idx_mapping(4, 0, 2, 5), ints(0, 9, 1, 9, -1, 0), ints(3, 9, 14, 9, 0, 8),
        ints(0, 5, 7, 12, 13), ints(1, 9, 3, 9, 1, 2), ints(*[-7] * R), ints(*[-7] * R), 4,
    ]  # fmt: skip
    name = "mamba_utils.preprocess_mamba_align_fused_kernel"
    return name, (1,), args, {"BLOCK_SIZE": 16, "MAMBA_BLOCK_SIZE": BLOCK_SIZE}


def layout(rows_first: bool) -> tuple[list[Any], int]:
    """A convolution's state and another one in one group of layers, one more in another group."""
    conv = torch.randn(BLOCKS, *((DIM, WIDTH) if rows_first else (WIDTH, DIM)))
    conv = conv.to(torch.bfloat16) if rows_first else conv
    others = [torch.randn(BLOCKS, 3, 37), torch.randn(BLOCKS, 41)]
    states = [conv, *others]
    tables = [torch.randperm(BLOCKS).repeat(R, 1).int() for _ in range(2)]
    args = [
        ("addresses", tables), BLOCKS, ("addresses", states),
        torch.tensor([s.stride(0) * s.element_size() for s in states]),
        ints(*(s.element_size() for s in states)),
        torch.tensor([1 if rows_first else DIM, 3 * 37, 41]), ints(WIDTH, 0, 0), ints(0, 0, 1),
        ints(DIM * rows_first, 0, 0), torch.tensor([WIDTH * conv.element_size(), 0, 0]),
    ]  # fmt: skip
    return args, len(states)


def precopy(rows_first: bool) -> Case:
    """Fresh, unchanged, padding, across a boundary, and with a token that was not accepted."""
    states, num_states = layout(rows_first)
    rows = idx_mapping(4, 0, -1, 2, 5)
    args = [ints(1, 9, 3, 9, 2, 5), ints(1, 9, 2, 9, -1, 3), ints(0, 0, 0, 0, 0, 1)]
    name = "mamba_utils.precopy_mamba_align_fused_kernel"
    return (
        name,
        (5, num_states, TILES),
        [*args, *states, rows, 5],
        {
            "COPY_BLOCK_SIZE": 16,
            "CONV_STATE_DIM_FIRST": rows_first,
            "HAS_IDX_MAPPING": True,
            "TEMPORAL_TILES": TILES,
        },
    )


def postprocess(rows_first: bool) -> Case:
    """Behind a boundary, on it with all accepted (nothing to do), padding, past it, within one."""
    states, num_states = layout(rows_first)
    accepted = ints(1, 9, 3, 9, 2, 2)
    args = [
        accepted.clone(), ints(1, 9, 1, 9, 2, 0), None, ints(15, 9, 17, 9, 16, 8), None, *states,
        accepted, idx_mapping(4, 0, -1, 2, 5), 5,
    ]  # fmt: skip
    name = "mamba_utils.postprocess_mamba_fused_kernel"
    return (
        name,
        (5, num_states, TILES),
        args,
        {
            "block_size": BLOCK_SIZE,
            "COPY_BLOCK_SIZE": 16,
            "CONV_STATE_DIM_FIRST": rows_first,
            "HAS_IDX_MAPPING": True,
            "PRECOMPUTED_NEW_COMPUTED": True,
            "TEMPORAL_TILES": TILES,
        },
    )


def scatter() -> Case:
    args = [idx_mapping(4, -1, 2), ints(3, 5, 0), ints(*[-7] * R)]
    return "gpu.model_states.mamba_hybrid._scatter_num_accepted_kernel", (3,), args, {}


def fill() -> Case:
    args = [idx_mapping(4, -1, 2), ints(*[-7] * R), 1]
    return "gpu.model_states.mamba_hybrid._fill_num_accepted_kernel", (3,), args, {}


CASES: dict[str, Callable[[], Case]] = {
    "zero_blocks": zero_blocks,
    "preprocess": preprocess,
    "precopy": lambda: precopy(rows_first=False),
    "precopy, rows first": lambda: precopy(rows_first=True),
    "postprocess": lambda: postprocess(rows_first=False),
    "postprocess, rows first": lambda: postprocess(rows_first=True),
    "scatter": scatter,
    "fill": fill,
}


def build(name: str) -> Case:
    torch.manual_seed(sorted(CASES).index(name))
    return CASES[name]()


def run_stand_in(case: Case) -> list[Any]:
    kernel, _, args, constants = case
    dtypes = {"pointers": torch.uint64, "addresses": torch.int64}
    given = [
        torch.tensor([t.data_ptr() for t in arg[1]], dtype=dtypes[arg[0]])
        if isinstance(arg, tuple)
        else arg
        for arg in args
    ]
    STAND_INS[kernel](*given, **constants)
    return args


def flatten(args: list[Any]) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for arg in args:
        tensors += arg[1] if isinstance(arg, tuple) else [arg] * isinstance(arg, torch.Tensor)
    return tensors


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The arguments of every case after vLLM's kernel, or its error."""
    cases = [build(name) for name in CASES]
    results = results_of(cases, tmp_path_factory.mktemp("stock"))
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_stand_in(name: str, interpreted: dict[str, Any]) -> None:
    stock = interpreted[name]
    assert not isinstance(stock, str), stock
    out = run_stand_in(build(name))
    for mine, theirs in zip(flatten(out), flatten(stock), strict=True):
        assert torch.equal(mine, theirs)
    changed = zip(flatten(build(name)[2]), flatten(out), strict=True)
    assert any(not torch.equal(before, after) for before, after in changed), "nothing was tested"
