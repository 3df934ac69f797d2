"""vLLM's model as the loop sees it: one decode step from static buffers, attention in step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer

if TYPE_CHECKING:
    from fusedstep.vllm_plugin.runner import FusedStepRunner


class VllmDecodeModel:
    """``fusedstep.window.loop.DecodeModel`` for a text model of Model Runner V2.

    The forward context is entered once per window. Per step only the attention metadata moves:
    each group's builder plans again from the ``seq_lens`` that ``advance`` wrote.
    """

    def __init__(self, runner: FusedStepRunner) -> None:
        self.runner = runner
        self.model = runner.model
        self.buffers = runner.input_buffers
        self.query_start_loc = torch.arange(
            runner.max_num_reqs + 1, dtype=torch.int32, device=runner.device
        )
        self.query_start_loc_cpu = self.query_start_loc.cpu()
        self.is_prefilling = torch.zeros(runner.max_num_reqs, dtype=torch.bool)
        self.seq_lens_upper_bound = np.zeros(runner.max_num_reqs, dtype=np.int32)
        self.common: list[CommonAttentionMetadata | None] = []
        self.attn_metadata: dict[str, Any] = {}
        self.context: AbstractContextManager[None] | None = None
        self.inputs: dict[str, Any] = {}

    def stage(
        self,
        seq_lens: np.ndarray,  # [num_reqs] int32, upper bound in the first step
    ) -> None:
        """Host part: what the attention may know of lengths without asking the device."""
        self.seq_lens_upper_bound[: len(seq_lens)] = seq_lens

    def begin(self, num_reqs: int) -> None:
        runner, buffers = self.runner, self.buffers
        slot_mappings = runner.block_tables.slot_mappings[:, :num_reqs]
        upper_bound = torch.from_numpy(self.seq_lens_upper_bound[:num_reqs])
        self.common = [
            CommonAttentionMetadata(
                query_start_loc=self.query_start_loc[: num_reqs + 1],
                query_start_loc_cpu=self.query_start_loc_cpu[: num_reqs + 1],
                seq_lens=buffers.seq_lens[:num_reqs],
                seq_lens_cpu_upper_bound=upper_bound,
                max_seq_len=int(upper_bound.max()),
                num_reqs=num_reqs,
                num_actual_tokens=num_reqs,
                max_query_len=1,
                block_table_tensor=block_table[:num_reqs],
                slot_mapping=slot_mapping,
                positions=buffers.positions[:num_reqs],
                is_prefilling=self.is_prefilling[:num_reqs],
            )
            for block_table, slot_mapping in zip(
                runner.block_tables.input_block_tables, slot_mappings, strict=True
            )
        ]
        self.attn_metadata = {}
        self._plan()
        self.inputs = {
            "input_ids": buffers.input_ids[:num_reqs],
            "positions": buffers.positions[:num_reqs],
            "inputs_embeds": None,
            "intermediate_tensors": None,
        }
        buffers.is_padding[:num_reqs].fill_(False)
        self.context = set_forward_context(
            self.attn_metadata,
            runner.vllm_config,
            num_tokens=num_reqs,
            batch_descriptor=BatchDescriptor(num_tokens=num_reqs),
            slot_mapping=build_slot_mappings_by_layer(slot_mappings, runner.kv_cache_config),
            is_padding=buffers.is_padding[:num_reqs],
        )
        self.context.__enter__()

    def forward(self) -> torch.Tensor:
        logits: torch.Tensor = self.model.compute_logits(self.model(**self.inputs))
        return logits

    def advance(self) -> None:
        self.seq_lens_upper_bound[: self.inputs["positions"].shape[0]] += 1
        for common in self.common:
            assert common is not None
            common.max_seq_len += 1
            common._num_computed_tokens_cache = None
        self._plan()

    def end(self) -> None:
        assert self.context is not None
        self.context.__exit__(None, None, None)
        self.context = None

    def _plan(self) -> None:
        """Attention metadata of the coming step, by layer."""
        for groups, common in zip(self.runner.attn_groups, self.common, strict=True):
            for group in groups:
                metadata = group.build_metadata(common, 0)
                self.attn_metadata.update(dict.fromkeys(group.layer_names, metadata))
