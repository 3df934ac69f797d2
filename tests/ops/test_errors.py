"""A tensor that a step cannot take is named when the step is bound, or when it first sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ops.world import Implementation, World, build_world, placed, random_logits

from fusedstep.errors import FusedStepError, TensorError
from fusedstep.ops.types import (
    BatchNeeds,
    RequestState,
    SamplingState,
    StepInputs,
    StopState,
    WindowRows,
    dtypes,
)

Change = Callable[[torch.Tensor], torch.Tensor]


def other_dtype(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int16 if tensor.dtype != torch.int16 else torch.int32)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Every second place of a tensor twice as wide."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def fewer_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[1:]


CHANGES: list[Change] = [other_dtype, strided, elsewhere]
PARTS = {"requests": RequestState, "sampling": SamplingState, "stop": StopState}


def tensor_fields(state_class: type) -> list[str]:
    return list(dtypes(state_class))


STATE = [(part, name) for part, cls in PARTS.items() for name in tensor_fields(cls)]
INPUTS = [("inputs", name) for name in tensor_fields(StepInputs)]


def changed(world: World, part: str, name: str, change: Change) -> World:
    state: Any = getattr(world, part)
    return replace(world, **{part: replace(state, **{name: change(getattr(state, name))})})


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("part", "name"), STATE + INPUTS)
def test_state(implementation: Implementation, part: str, name: str, change: Change) -> None:
    world = changed(build_world(64, 3).clone(implementation.device), part, name, change)
    # Triton takes its device from the matrix of counts: the next tensor is then the wrong one.
    sets_device = implementation.name == "triton" and name == "output_bin_counts"
    named = name if not (sets_device and change is elsewhere) else "last_sampled_tokens"
    with pytest.raises(TensorError, match=f"^{named}: "):
        world.bind(implementation.step_class)


@pytest.mark.parametrize(("part", "name"), STATE)
def test_a_row_is_missing(implementation: Implementation, part: str, name: str) -> None:
    world = changed(build_world(64, 3).clone(implementation.device), part, name, fewer_rows)
    # The matrix of counts says how many rows there are: the others are then too long.
    named = name if name != "output_bin_counts" else "last_sampled_tokens"
    with pytest.raises(TensorError, match=f"^{named}: .*expected size"):
        world.bind(implementation.step_class)


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("prompt_bin_mask", {"prompt_bin_mask": torch.zeros(6, 1, dtype=torch.int32)}),
        ("last_sampled_tokens", {"last_sampled_tokens": torch.zeros(6, 2, dtype=torch.int64)}),
        ("output_bin_counts", {"output_bin_counts": torch.zeros(6, dtype=torch.int32)}),
    ],
    ids=["short-mask", "wide-tokens", "counts-vector"],
)
def test_widths(implementation: Implementation, named: str, changes: dict[str, Any]) -> None:
    world = build_world(64, 3)
    world = replace(world, requests=replace(world.requests, **changes))
    with pytest.raises(TensorError, match=f"^{named}: "):
        world.clone(implementation.device).bind(implementation.step_class)


def test_one_table_and_one_number_of_blocks_per_group(implementation: Implementation) -> None:
    world = build_world(64, 3, block_sizes=(16, 8)).clone(implementation.device)
    cases = [
        ("block_tables", replace(world, block_tables=world.block_tables[:1])),
        (r"block_tables\[1\]", replace(world, block_tables=world.block_tables[:1] * 2)),
        (
            r"block_tables\[0\]",
            replace(world, block_tables=tuple(table.long() for table in world.block_tables)),
        ),
        ("num_blocks", replace(world, num_blocks=world.num_blocks[:1])),
        ("num_blocks", replace(world, num_blocks=world.num_blocks.long())),
        ("slot_mappings", changed(world, "inputs", "slot_mappings", fewer_rows)),
        (
            "sliding_reach",
            replace(world, inputs=replace(world.inputs, sliding_reach=(0,))),
        ),
        (
            "input_block_tables",
            changed(world, "inputs", "input_block_tables", lambda tables: tables[:1]),
        ),
    ]
    for named, wrong in cases:
        with pytest.raises(TensorError, match=f"^(input_)?{named}: "):
            wrong.bind(implementation.step_class)


ROWS = [(name, change) for name in tensor_fields(WindowRows) for change in CHANGES]
for single in ("stop_weight", "num_active"):
    ROWS.remove((single, strided))  # one element is contiguous
ROWS += [(name, fewer_rows) for name in tensor_fields(WindowRows) if not name.startswith("out_")]


@pytest.mark.parametrize(("name", "change"), ROWS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("call", ["prepare", "sample", "step"])
def test_rows(implementation: Implementation, call: str, name: str, change: Change) -> None:
    world = build_world(64, 3).clone(implementation.device)
    rows = replace(world.rows, **{name: change(getattr(world.rows, name))})
    args: tuple[Any, ...] = (rows, 3)
    if call != "prepare":
        args = (random_logits(3, 64).to(implementation.device), *args, BatchNeeds())
    # The mapping says how many rows there are: the next tensor is then too long.
    named = name if (name, change) != ("idx_mapping", fewer_rows) else "steps_allowed"
    with pytest.raises(TensorError, match=f"^{named}: "):
        getattr(world.bind(implementation.step_class), call)(*args)


def bad_logits() -> dict[str, tuple[torch.Tensor, str]]:
    logits = random_logits(3, 64)
    return {
        "rows": (logits[:2], r"shape \(2, 64\), expected \(3, 64\)"),
        "vocabulary": (logits[:, :63], r"shape \(3, 63\)"),
        "dimensions": (logits[0], r"shape \(64,\)"),
        "dtype": (logits.double(), "dtype torch.float64"),
        "integers": (logits.int(), "dtype torch.int32"),
        "column-major": (logits.T.contiguous().T, "strides"),
        "strided": (strided(logits), "strides"),
        "device": (logits.to("meta"), "on meta"),
    }


@pytest.mark.parametrize("call", ["sample", "step"])
@pytest.mark.parametrize("case", bad_logits())
def test_logits(implementation: Implementation, case: str, call: str) -> None:
    world = build_world(64, 3).clone(implementation.device)
    step = world.bind(implementation.step_class)
    step.prepare(world.rows, 3)
    logits, message = bad_logits()[case]
    if case != "device":
        logits = placed(logits, implementation.device)
    with pytest.raises(TensorError, match=f"^logits: {message}"):
        getattr(step, call)(logits, world.rows, 3, BatchNeeds())


def test_it_is_an_error_of_ours() -> None:
    assert issubclass(TensorError, FusedStepError)


def test_more_requests_than_rows(implementation: Implementation) -> None:
    world = build_world(63, 2).clone(implementation.device)
    num_reqs = len(world.rows.idx_mapping) + 1
    with pytest.raises(TensorError, match=rf"^idx_mapping: {num_reqs - 1} rows, fewer than"):
        world.bind(implementation.step_class).prepare(world.rows, num_reqs)
