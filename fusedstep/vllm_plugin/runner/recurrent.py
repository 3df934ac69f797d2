"""Recurrent state in the steps of a window: Mamba2, gated delta net, short convolutions.

Writing a key twice does no harm, advancing a state twice does. So a row that is not active, or only
padding, works on the null block: a request whose reservation is used up lives on behind this
window, and its state must be found where its last token left it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID
from vllm.v1.kv_cache_interface import MambaSpec

from fusedstep.ops.types import WindowRows

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
    from vllm.v1.worker.utils import AttentionGroup

# Builders whose metadata of a decode batch moves along by its state indices alone, and the field
# that holds them: [num_reqs, 1] or [num_reqs] int32. By exact name: a subclass may keep more.
STATE_INDICES = {
    "Mamba2AttentionMetadataBuilder": "state_indices_tensor_d",
    "ShortConvAttentionMetadataBuilder": "state_indices_tensor_d",
    "GDNAttentionMetadataBuilder": "non_spec_state_indices_tensor",
}


def is_recurrent(group: AttentionGroup) -> bool:
    return isinstance(group.kv_cache_spec, MambaSpec)


@dataclass(frozen=True)
class Layers:
    """Layers whose state stands in the same blocks."""

    name: str  # of the first
    table: torch.Tensor  # [R, max_num_blocks] int32, by batch_idx
    indices: str  # field of their metadata
    builder: Any


class RecurrentState:
    """The states of a window's rows: one block each, which changes at the end of a block where
    states are cached (``align``)."""

    def __init__(
        self, runner: GPUModelRunner, groups: list[AttentionGroup], rows: WindowRows
    ) -> None:
        """``groups``: those with recurrent state."""
        self.rows = rows
        self.positions = runner.input_buffers.positions
        tables = runner.block_tables.input_block_tables
        builders = [group.get_metadata_builder(0) for group in groups]
        self.layers = [
            Layers(
                group.layer_names[0],
                tables[group.kv_cache_group_id],
                STATE_INDICES[type(builder).__name__],
                builder,
            )
            for group, builder in zip(groups, builders, strict=True)
        ]
        self.states = [
            state
            for group in groups
            for name in group.layer_names
            for state in runner.compilation_config.static_forward_context[name].kv_cache
        ]
        max_num_reqs, device = runner.max_num_reqs, runner.device
        # The block of each row's next token, among those of its request. Without ``align`` a
        # request has one.
        self.columns = torch.zeros(max_num_reqs, 1, dtype=torch.int64, device=device)
        self.aligned: Alignment | None = None
        if runner.vllm_config.cache_config.mamba_cache_mode == "align":
            self.aligned = Alignment(runner)

    def begin(self) -> None:
        """A window starts. vLLM's last step may have left its own batch's indices with a builder,
        which would take them for ours."""
        for layers in self.layers:
            if getattr(layers.builder, "mamba_aligned_state_indices", None) is not None:
                layers.builder.mamba_aligned_state_indices = None

    def prepare_step(self, num_rows: int) -> None:
        """Before the metadata of a step: each active row's state stands in the block of its next
        token, all others have the null block.

        Torch, not a part of our kernels: small launches on fixed addresses beside the dozens of a
        step, and only for models that have such groups.
        """
        self.hide_inactive(num_rows)
        if self.aligned is not None:
            self.aligned.move_states(num_rows, self.rows, self.positions, self.columns)

    def hide_inactive(self, num_rows: int) -> None:
        """The null block for rows that are not active; ``prepare`` fills in the tables again."""
        inactive = self.rows.active[:num_rows, None].logical_not()
        for layers in self.layers:
            layers.table[:num_rows].masked_fill_(inactive, NULL_BLOCK_ID)

    def move_along(self, attn_metadata: dict[str, Any], num_rows: int) -> None:
        """The metadata of the step before becomes that of the coming one, in place."""
        columns = self.columns[:num_rows]
        for layers in self.layers:
            indices = getattr(attn_metadata[layers.name], layers.indices)
            table = layers.table[:num_rows]
            if indices.data_ptr() != table.data_ptr():  # it may be the table itself
                torch.gather(table, 1, columns, out=indices.view(num_rows, 1))

    def forget(self, num_blocks: int) -> None:
        """Zero states in the first blocks. Nobody may use them."""
        for state in self.states:
            state[:num_blocks].zero_()


class Alignment:
    """Moves states where they are cached: each block keeps the state at its end, so a row whose
    next token is the first of a block takes its state along, with vLLM's own kernel.
    """

    def __init__(self, runner: GPUModelRunner) -> None:
        state: MambaHybridModelState = runner.model_state
        _, spec = state._get_mamba_group_info(runner.kv_cache_config)
        self.block_size: int = spec.block_size
        self.copies = state._mamba_ctx
        num_rows, device = runner.max_num_reqs, runner.device
        # By req_state_idx; the last entry is nobody's, for rows that stand still. vLLM's own steps
        # go on from the running block, so its tensor is ours.
        self.nobody = num_rows
        running = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        running[:num_rows] = state._mamba_state_idx_gpu
        self.running = running
        state._mamba_state_idx_gpu = running[:num_rows]
        self.previous = torch.full_like(running, -1)
        self.no_bias = torch.zeros_like(running)

    def move_states(
        self, num_rows: int, rows: WindowRows, positions: torch.Tensor, columns: torch.Tensor
    ) -> None:
        """Copies states across the boundary of a block. ``columns`` [R, 1] are written."""
        idx_mapping, position = rows.idx_mapping[:num_rows], positions[:num_rows]
        column = torch.floor_divide(position, self.block_size, out=columns[:num_rows, 0])
        before = torch.floor_divide(position - 1, self.block_size)
        target = torch.where(rows.active[:num_rows], idx_mapping, self.nobody)
        self.previous.fill_(-1)
        self.previous.index_copy_(0, target, before.int())
        self.running.index_copy_(0, target, column.int())
        # It looks at the rows' requests, skips padding (-1), and copies where the blocks differ.
        self.copies.run_fused_precopy(
            num_rows, self.running, self.previous, self.no_bias, idx_mapping
        )
