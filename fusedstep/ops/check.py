"""What a step operation demands of its tensors; each error names the tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch

from fusedstep.errors import TensorError
from fusedstep.ops.types import (
    RequestState,
    SamplingState,
    StepInputs,
    StopState,
    WindowRows,
)

LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Everything that is not int32.
_DTYPES = {
    "last_sampled_tokens": torch.int64,
    "stopped": torch.bool,
    "temperature": torch.float32,
    "seeds": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "repetition_penalty": torch.float32,
    "frequency_penalty": torch.float32,
    "presence_penalty": torch.float32,
    "logit_bias": torch.float32,
    "positions": torch.int64,
    "slot_mappings": torch.int64,
    "idx_mapping": torch.int64,
    "active": torch.bool,
    "sampled": torch.int64,
    "logprobs": torch.float32,
    "ranks": torch.int64,
    "out_tokens": torch.int64,
}


def check_state(
    requests: RequestState,
    sampling: SamplingState,
    stop: StopState,
    inputs: StepInputs,
    block_tables: tuple[torch.Tensor, ...],
    num_blocks: torch.Tensor,
    device: torch.device,
) -> None:
    """Raise TensorError unless the state fits together, is contiguous and lies on ``device``."""
    max_num_reqs, vocab_size = _matrix("output_bin_counts", requests.output_bin_counts)
    for state in (requests, sampling, stop):
        for name, tensor in _tensors(state):
            _check(name, tensor, device)
            _expect(name, tensor, 0, max_num_reqs)
    _expect("prompt_bin_mask", requests.prompt_bin_mask, 1, -(-vocab_size // 32))
    _expect("last_sampled_tokens", requests.last_sampled_tokens, 1, 1)
    for name, tensor in _tensors(inputs):
        _check(name, tensor, device)
    num_groups = len(inputs.block_sizes)
    _expect("slot_mappings", inputs.slot_mappings, 0, num_groups)
    _check("num_blocks", num_blocks, device)
    _expect("num_blocks", num_blocks, 0, num_groups)
    for name, tables in (
        ("block_tables", block_tables),
        ("input_block_tables", inputs.input_block_tables),
    ):
        if len(tables) != num_groups:
            raise TensorError(f"{name}: {len(tables)} tables for {num_groups} block sizes")
        for group, table in enumerate(tables):
            _check(f"{name}[{group}]", table, device, torch.int32)
            _expect(f"{name}[{group}]", table, 1, block_tables[group].shape[1])


def check_rows(rows: WindowRows, device: torch.device) -> None:
    """Raise TensorError unless all tensors of ``rows`` have one batch size and fit a step."""
    (batch_size,) = rows.idx_mapping.shape
    for name, tensor in _tensors(rows):
        _check(name, tensor, device)
        size = 1 if name in ("stop_weight", "num_active") else batch_size
        _expect(name, tensor, tensor.dim() - 1, size)


def check_logits(
    logits: torch.Tensor, num_reqs: int, vocab_size: int, device: torch.device
) -> None:
    """Raise TensorError unless ``logits`` is [num_reqs, vocab_size], unit stride in the second."""
    if logits.shape != (num_reqs, vocab_size):
        raise TensorError(
            f"logits: shape {tuple(logits.shape)}, expected ({num_reqs}, {vocab_size})"
        )
    if logits.dtype not in LOGITS_DTYPES:
        names = ", ".join(map(str, LOGITS_DTYPES))
        raise TensorError(f"logits: dtype {logits.dtype}, expected one of {names}")
    if vocab_size > 1 and logits.stride(1) != 1:
        raise TensorError(f"logits: strides {logits.stride()}, a row must be contiguous")
    _check_device("logits", logits, device)


def check_num_reqs(rows: WindowRows, num_reqs: int) -> None:
    """Raise TensorError unless ``rows`` has room for so many."""
    if num_reqs > len(rows.idx_mapping):
        raise TensorError(f"idx_mapping: {len(rows.idx_mapping)} rows, fewer than {num_reqs}")


def check_token_ids(token_ids: torch.Tensor, device: torch.device) -> None:
    """Raise TensorError unless ``token_ids`` is int64 [n, m], unit stride in the second."""
    if token_ids.dim() != 2 or token_ids.dtype != torch.int64:
        shape = tuple(token_ids.shape)
        raise TensorError(f"token_ids: {token_ids.dtype} of shape {shape}, expected int64 [n, m]")
    if token_ids.shape[1] > 1 and token_ids.stride(1) != 1:
        strides = token_ids.stride()
        raise TensorError(f"token_ids: strides {strides}, a row must be contiguous")
    _check_device("token_ids", token_ids, device)


def _tensors(state: object) -> Iterator[tuple[str, torch.Tensor]]:
    for field in fields(state):  # type: ignore[arg-type]
        value = getattr(state, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value


def _check(
    name: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> None:
    dtype = dtype or _DTYPES.get(name, torch.int32)
    if tensor.dtype != dtype:
        raise TensorError(f"{name}: dtype {tensor.dtype}, expected {dtype}")
    if not tensor.is_contiguous():
        raise TensorError(f"{name}: strides {tensor.stride()}, expected a contiguous tensor")
    _check_device(name, tensor, device)


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device.type != device.type:
        raise TensorError(f"{name}: on {tensor.device}, expected {device}")


def _expect(name: str, tensor: torch.Tensor, dim: int, size: int) -> None:
    if tensor.dim() <= dim or tensor.shape[dim] != size:
        shape = tuple(tensor.shape)
        raise TensorError(f"{name}: shape {shape}, expected size {size} in dimension {dim}")


def _matrix(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise TensorError(f"{name}: shape {tuple(tensor.shape)}, expected 2 dimensions")
    return tensor.shape[0], tensor.shape[1]
