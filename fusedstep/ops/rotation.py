"""Norm of heads and rotary embedding: within decode attention, or as a launch for any batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fusedstep.errors import TensorError
from fusedstep.kernels.attention_rotary import rotate_kernel
from fusedstep.ops.launch import Launch

MAX_HEAD_SIZE = 128  # larger ones leave decode attention too few registers
BLOCK_NUMBERS = 4096  # of a program that rotates


class RotationArgs(NamedTuple):
    """As the kernels take it."""

    cos_sin: torch.Tensor
    query_norm: torch.Tensor
    key_norm: torch.Tensor
    stride: int
    epsilon: float


@dataclass(frozen=True)
class Rotation:
    """Norm of a head of a query or key, where there is one, then Neox rotation of its first dims.

    The position of a row's last new token is the row's length less one.
    """

    cos_sin: torch.Tensor  # [positions, rotary_dim] of any float: cosines, then sines
    query_norm: torch.Tensor | None = None  # [head_size] weights; both or none
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0
    rounded: bool = False  # the norm rounds to the query's dtype, before and after its weight

    @property
    def rotary_dim(self) -> int:
        return self.cos_sin.shape[1]

    @property
    def args(self) -> RotationArgs:
        unused = self.cos_sin
        query_norm = unused if self.query_norm is None else self.query_norm
        key_norm = unused if self.key_norm is None else self.key_norm
        return RotationArgs(
            self.cos_sin, query_norm, key_norm, self.cos_sin.stride(0), float(self.epsilon)
        )

    @property
    def constexprs(self) -> dict[str, Any]:
        has_norm = self.query_norm is not None
        return {
            "ROTARY_DIM": self.rotary_dim,
            "QK_NORM": has_norm,
            "ROUNDED": has_norm and self.rounded,
        }

    def check(self, head_size: int) -> None:
        """Raises TensorError for what the kernels are not made for."""
        if head_size > MAX_HEAD_SIZE:
            raise TensorError(f"rotation: heads of {head_size}, expected up to {MAX_HEAD_SIZE}")
        if self.cos_sin.dim() != 2 or self.rotary_dim % 2 or not 2 <= self.rotary_dim <= head_size:
            shape = tuple(self.cos_sin.shape)
            expected = f"[positions, an even number up to {head_size}]"
            raise TensorError(f"cos_sin: shape {shape}, expected {expected}")
        if self.cos_sin.stride(1) != 1:
            raise TensorError(f"cos_sin: strides {self.cos_sin.stride()}, expected (n, 1)")
        if (self.query_norm is None) != (self.key_norm is None):
            raise TensorError("query_norm, key_norm: one of them, expected both or none")
        for name, weight in (("query_norm", self.query_norm), ("key_norm", self.key_norm)):
            if weight is not None and (weight.shape != (head_size,) or weight.stride() != (1,)):
                shape = tuple(weight.shape)
                raise TensorError(f"{name}: shape {shape}, expected [{head_size}], contiguous")


NO_ROTATION: dict[str, Any] = {"ROTARY_DIM": 0, "QK_NORM": False, "ROUNDED": False}


class _Heads(NamedTuple):
    """Tensors, or their strides of a token and of a head."""

    query: Any
    key: Any
    rotated_query: Any
    rotated_key: Any


def rotate(
    rotation: Rotation,
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    seq_lens: torch.Tensor,  # [num_rows] int32, the new tokens included
    starts: torch.Tensor,  # [num_rows + 1] int32: row i's new tokens are starts[i : i + 2]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, normed and rotated, of rows of any numbers of new tokens.

    Tokens of no row are left as ``torch.empty`` makes them.
    """
    rotated = torch.empty_like(query), torch.empty_like(key)
    rotate_launch(rotation, query, key, seq_lens, starts, *rotated)()
    return rotated


def rotate_launch(
    rotation: Rotation,
    query: torch.Tensor,
    key: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    rotated_query: torch.Tensor,
    rotated_key: torch.Tensor,
) -> Launch:
    """The kernel that ``rotate`` launches; it depends on shapes only."""
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, num_rows = key.shape[1], seq_lens.shape[0]
    rotation.check(head_size)
    if starts.shape[0] <= num_rows:
        raise TensorError(f"starts: {starts.shape[0]} numbers, expected {num_rows + 1}")
    heads = _Heads(query, key, rotated_query, rotated_key)
    dims = max(1 << (head_size - 1).bit_length(), 16)
    block = max(BLOCK_NUMBERS // dims, 1)
    num_blocks = -(-num_tokens * num_heads // block) + -(-num_tokens * num_kv_heads // block)
    return Launch(
        rotate_kernel,
        (num_blocks,),
        {
            "heads": heads,
            "seq_lens_ptr": seq_lens,
            "starts_ptr": starts,
            "rotation": rotation.args,
            "strides": _Heads(*(tensor.stride()[:2] for tensor in heads)),
            "num_tokens": num_tokens,
            "num_rows": num_rows,
        },
        {
            "HEAD_SIZE": head_size,
            "DIMS": dims,
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "ROW_BITS": num_rows.bit_length(),
            "BLOCK": block,
        }
        | rotation.constexprs,
        num_warps=4,
    )
