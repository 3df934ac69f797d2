"""Checks of the tensors that a step operation takes; each error names the tensor."""

from __future__ import annotations

import torch

from fusedstep.errors import TensorError
from fusedstep.ops.types import GrammarState, RowTokens, StepState, TokenInputs, WindowRows, dtypes

LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_state(state: StepState, device: torch.device) -> None:
    """Raise TensorError unless the state fits together, is contiguous and lies on ``device``."""
    requests, inputs = state.requests, state.inputs
    max_num_reqs, vocab_size = _matrix("output_bin_counts", requests.output_bin_counts)
    for part in (requests, state.sampling, state.stop):
        for name in _check_all(part, device):
            _expect(name, getattr(part, name), 0, max_num_reqs)
    _expect("prompt_bin_mask", requests.prompt_bin_mask, 1, -(-vocab_size // 32))
    _expect("last_sampled_tokens", requests.last_sampled_tokens, 1, 1)
    if state.grammar is not None:
        _check_grammar(state.grammar, max_num_reqs, vocab_size, device)
    _check_all(inputs, device)
    num_groups = len(inputs.block_sizes)
    if len(inputs.sliding_reach) != num_groups:
        got = len(inputs.sliding_reach)
        raise TensorError(f"sliding_reach: of {got} groups, expected {num_groups}")
    _expect("slot_mappings", inputs.slot_mappings, 0, num_groups)
    _check("num_blocks", state.num_blocks, device, torch.int32)
    _expect("num_blocks", state.num_blocks, 0, num_groups)
    for name, tables in (
        ("block_tables", state.block_tables),
        ("input_block_tables", inputs.input_block_tables),
    ):
        if len(tables) != num_groups:
            raise TensorError(f"{name}: {len(tables)} tables for {num_groups} block sizes")
        for group, table in enumerate(tables):
            _check(f"{name}[{group}]", table, device, torch.int32)
            _expect(f"{name}[{group}]", table, 1, state.block_tables[group].shape[1])


def _check_grammar(
    grammar: GrammarState, max_num_reqs: int, vocab_size: int, device: torch.device
) -> None:
    _check_all(grammar, device)
    for name in ("states", "reasoning_ends"):
        _expect(name, getattr(grammar, name), 0, max_num_reqs)
    _expect("reasoning_ends", grammar.reasoning_ends, 1, 2)
    _expect("next_states", grammar.next_states, 1, 256)
    _expect("mask_ids", grammar.mask_ids, 0, len(grammar.next_states))
    _expect("masks", grammar.masks, 1, -(-vocab_size // 32))
    _expect("token_starts", grammar.token_starts, 0, vocab_size + 1)


def check_rows(rows: WindowRows, device: torch.device) -> None:
    """Raise TensorError unless all tensors of ``rows`` have one batch size and fit a step."""
    (batch_size,) = rows.idx_mapping.shape
    for name in _check_all(rows, device):
        tensor = getattr(rows, name)
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


def check_round(
    tokens: torch.Tensor, num_tokens: torch.Tensor, num_reqs: int, device: torch.device
) -> None:
    """Raise TensorError unless these are the tokens of ``num_reqs`` rows, and their numbers."""
    _check("tokens", tokens, device, torch.int64)
    _check("num_tokens", num_tokens, device, torch.int32)
    if tokens.dim() != 2 or len(tokens) != num_reqs:
        shape = tuple(tokens.shape)
        raise TensorError(f"tokens: shape {shape}, expected ({num_reqs}, 1 + drafts)")
    _expect("num_tokens", num_tokens, 0, num_reqs)


def check_token_inputs(out: TokenInputs, device: torch.device) -> None:
    """Raise TensorError unless these are inputs of a forward on ``device``."""
    _check_all(out, device)
    _expect("positions", out.positions, 0, len(out.input_ids))
    _expect("slot_mappings", out.slot_mappings, 1, len(out.input_ids))


def check_place(out: TokenInputs, tokens: RowTokens, num_reqs: int) -> None:
    """Raise TensorError unless there is room for these tokens of ``num_reqs`` rows."""
    drafts, width = tokens.drafts, tokens.width
    if drafts.dtype != torch.int64 or len(drafts) < num_reqs:
        rows = f"{len(drafts)} rows of {drafts.dtype}"
        raise TensorError(f"drafts: {rows}, expected {num_reqs} of torch.int64")
    if len(out.input_ids) < num_reqs * width:
        room = len(out.input_ids)
        raise TensorError(f"input_ids: {room} tokens, fewer than {num_reqs} rows of {width}")


def check_num_reqs(rows: WindowRows, num_reqs: int) -> None:
    """Raise TensorError unless ``rows`` has room for so many."""
    if num_reqs > len(rows.idx_mapping):
        raise TensorError(f"idx_mapping: {len(rows.idx_mapping)} rows, fewer than {num_reqs}")


def _check_all(state: object, device: torch.device) -> list[str]:
    """Check each tensor of one of the state's classes; returns their names."""
    expected = dtypes(type(state))
    for name, dtype in expected.items():
        _check(name, getattr(state, name), device, dtype)
    return list(expected)


def _check(name: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
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
