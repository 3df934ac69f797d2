"""Stand-ins, as in ``stock_kernels``, for the kernels that keep recurrent state and KV blocks.

Interpreted they take seconds per step, or fail: one calls a function of Triton's own library, which
must have been imported for the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fusedstep.vllm_plugin.cpu import native_state_kernels as native

Array = npt.NDArray[Any]


class Layout(NamedTuple):
    """Of every state: where it stands, and how large it is."""

    addresses: Array
    block_strides: Array  # bytes
    item_sizes: Array
    inner_sizes: Array
    conv_widths: Array  # 0: not of a convolution
    groups: Array  # whose block table it has
    num_rows: Array  # where a convolution's rows come first
    row_strides: Array


def _arrays(args: Any) -> list[Any]:
    return [arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in args]


def zero_blocks(*args: Any, **_constants: Any) -> None:
    """``_zero_kv_blocks_kernel``."""
    native.zero_blocks(*_arrays(args[:4]))


def preprocess(*args: Any, MAMBA_BLOCK_SIZE: int, **_constants: Any) -> None:
    """``preprocess_mamba_align_fused_kernel``."""
    native.advance_running_blocks(*_arrays(args[:8]), MAMBA_BLOCK_SIZE)


def precopy(
    *args: Any, CONV_STATE_DIM_FIRST: bool, HAS_IDX_MAPPING: bool, **_constants: Any
) -> None:
    """``precopy_mamba_align_fused_kernel`` as Model Runner V2 calls it."""
    assert HAS_IDX_MAPPING, "Model Runner V1 has its own kernels"
    running, previous, bias, tables, stride = _arrays(args[:5])
    idx_mapping, num_reqs = _arrays(args[13:15])
    native.copy_across_blocks(
        *(running, previous, bias, tables, stride, Layout(*_arrays(args[5:13]))),
        *(idx_mapping, num_reqs, CONV_STATE_DIM_FIRST),
    )


def postprocess(
    *args: Any,
    block_size: int,
    CONV_STATE_DIM_FIRST: bool,
    HAS_IDX_MAPPING: bool,
    PRECOMPUTED_NEW_COMPUTED: bool,
    **_constants: Any,
) -> None:
    """``postprocess_mamba_fused_kernel`` as Model Runner V2 calls it."""
    assert HAS_IDX_MAPPING and PRECOMPUTED_NEW_COMPUTED, "Model Runner V1 has its own kernels"
    num_accepted, running, _, num_computed, _, tables, stride = _arrays(args[:7])
    new_num_accepted, idx_mapping, num_reqs = _arrays(args[15:18])
    native.keep_aligned_states(
        *(num_accepted, running, num_computed, tables, stride, Layout(*_arrays(args[7:15]))),
        *(new_num_accepted, idx_mapping, num_reqs, block_size, CONV_STATE_DIM_FIRST),
    )


def scatter_num_accepted(
    idx_mapping: torch.Tensor, num_sampled: torch.Tensor, num_accepted: torch.Tensor
) -> None:
    """``_scatter_num_accepted_kernel``."""
    rows, sampled = idx_mapping.numpy(), num_sampled.numpy()
    num_accepted.numpy()[rows[rows >= 0]] = np.maximum(sampled[: len(rows)][rows >= 0], 1)


def fill_num_accepted(idx_mapping: torch.Tensor, num_accepted: torch.Tensor, value: int) -> None:
    """``_fill_num_accepted_kernel``."""
    rows = idx_mapping.numpy()
    num_accepted.numpy()[rows[rows >= 0]] = value


STAND_INS: dict[str, Callable[..., None]] = {  # behind "vllm.v1.worker."
    "utils._zero_kv_blocks_kernel": zero_blocks,
    "mamba_utils.preprocess_mamba_align_fused_kernel": preprocess,
    "mamba_utils.precopy_mamba_align_fused_kernel": precopy,
    "mamba_utils.postprocess_mamba_fused_kernel": postprocess,
    "gpu.model_states.mamba_hybrid._scatter_num_accepted_kernel": (scatter_num_accepted),
    "gpu.model_states.mamba_hybrid._fill_num_accepted_kernel": fill_num_accepted,
}
