"""The drafters that are heads of the target: EAGLE, EAGLE-3, and MTP with one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture
from vllm.v1.worker.gpu.spec_decode.mtp.speculator import MTPSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import (
    TargetDependentARSpeculator,
    prepare_decode_inputs,
    prepare_prefill_inputs,
)

from fusedstep.ops.types import WindowRows
from fusedstep.vllm_plugin.runner.decode_model import map_block_tables
from fusedstep.vllm_plugin.runner.drafter import StockDrafter, Verified

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner


class HeadDrafter(StockDrafter):
    """vLLM's own head of the target, in its own graphs; or recorded with the round.

    The head reads a round's tokens with the target's attention metadata and hidden states, which
    gives the first draft. Each other draft is a forward of one token a row.
    """

    def __init__(self, runner: GPUModelRunner, rows: WindowRows) -> None:
        super().__init__(runner)
        self.rows = rows
        self.speculator: TargetDependentARSpeculator = runner.speculator
        self.num_drafts: int = runner.num_speculative_steps
        self.groups = [g for groups in self.speculator.attn_groups for g in groups]
        self.attn_metadata: dict[str, Any] = {}  # of the drafts behind the first
        self.slots_by_layer: dict[str, torch.Tensor] = {}

    @property
    def is_recordable(self) -> bool:
        speculator = self.speculator
        plans_on_device = self.num_drafts == 1 or speculator.supports_decode_metadata_update
        mtp: MTPSpeculator | None = speculator if isinstance(speculator, MTPSpeculator) else None
        # All that asks the host, or takes more than a round's tokens.
        others = (
            speculator.supports_mm_inputs,
            mtp is not None and mtp.share_mtp_topk_indices,
            speculator.dcp_size > 1,
            speculator.eplb_state is not None,
            speculator.pcp_manager is not None,
            speculator.acceptance_estimator is not None,
            speculator.draft_watermarker is not None,
        )
        return plans_on_device and not any(others)

    def stage(self, num_reqs: int) -> None:
        speculator, sampling = self.speculator, self.runner.sampler.sampling_states
        speculator._copy_request_inputs(
            num_reqs, self.rows.idx_mapping[:num_reqs], sampling.temperature.gpu, sampling.seeds.gpu
        )
        map_block_tables(self.runner, self.groups)

    def plan_to_record(self, num_rows: int) -> None:
        """As vLLM plans its own graph of them."""
        speculator = self.speculator
        self.attn_metadata, self.slots_by_layer = prepare_inputs_to_capture(
            num_rows,
            num_rows,
            speculator.model_state,
            speculator.input_buffers,
            speculator.block_tables,
            speculator.attn_groups,
            speculator.kv_cache_config,
            full_cudagraph=True,
            max_query_len=1,
        )

    def launch(self, verified: Verified) -> torch.Tensor:
        """``propose`` without what it asks the host."""
        speculator, states, batch = self.speculator, self.runner.req_states, verified.batch
        num_rows = batch.num_reqs
        # As in ``propose``; a padding row has taken none, but no length may be below zero.
        num_tokens = verified.num_tokens.clamp(min=1)
        num_rejected = 1 + self.num_drafts - num_tokens
        num_rejected.masked_fill_(self.rows.idx_mapping[:num_rows] < 0, 0)
        prepare_prefill_inputs(
            speculator.last_token_indices,
            speculator.current_draft_step,
            speculator.input_buffers,
            batch,
            num_tokens,
            num_rejected,
            states.last_sampled_tokens,
            states.next_prefill_tokens,
            speculator.max_num_reqs,
        )
        hidden_states = self._head_inputs(verified)
        speculator.hidden_states[: len(hidden_states)].copy_(hidden_states)
        speculator._prefill(
            num_rows, batch.num_tokens, verified.attn_metadata, verified.slots_by_layer, None
        )
        drafts: torch.Tensor = speculator.draft_tokens[:num_rows]
        if self.num_drafts == 1:
            return drafts
        prepare_decode_inputs(
            drafts[:, 0],
            batch.seq_lens,
            num_rejected,
            speculator.input_buffers,
            speculator.sample_src_positions,
            speculator.max_model_len,
            speculator.max_num_reqs,
        )
        speculator._generate_fused_drafts(
            num_rows,
            num_rows,
            self.attn_metadata,
            self.slots_by_layer,
            None,
            CUDAGraphMode.NONE,
            self.num_drafts,
        )
        return drafts

    def _head_inputs(self, verified: Verified) -> torch.Tensor:
        """The target's hidden states as the head takes them: [num_tokens, hidden_size]."""
        if verified.aux_hidden_states:
            layers = torch.cat(verified.aux_hidden_states, dim=-1)
            combined: torch.Tensor = self.speculator.model.combine_hidden_states(layers)
            return combined
        return self.target_states(verified)
