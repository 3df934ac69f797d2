"""Inputs of the model's forward in a decode step: token ids, embeddings, positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.interfaces import requires_raw_input_tokens
from vllm.v1.worker.gpu.model_states.encoder_decoder import EncoderDecoderModelState

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from fusedstep.vllm_plugin.runner.tables import DeviceTables


class ModelInputs:
    """``DefaultModelState``'s inputs of a decode step, from the step's own on the device.

    Embeddings: those of the token ids. An encoder's output and prompt embeddings are for prompts.
    M-RoPE: a row's position plus its prefill's delta, in every dimension. Both go to vLLM's own
    buffers, whose addresses its graphs and ours have recorded.
    """

    def __init__(
        self,
        runner: GPUModelRunner,
        tables: DeviceTables,
        idx_mapping: torch.Tensor,  # [max_num_reqs] int32, batch_idx -> req_state_idx, -1: padding
    ) -> None:
        state = runner.model_state
        self.buffers = runner.input_buffers
        self.idx_mapping = idx_mapping
        self.prefill_delta = tables.prefill_delta
        rope = getattr(state, "rope_state", None)  # which encoder-decoder models lack
        self.rope_positions = None if rope is None else rope.positions
        # The encoder's outputs are for prompts: its keys are in the KV cache.
        across = isinstance(state, EncoderDecoderModelState)
        self.others: dict[str, Any] = {"encoder_outputs": []} if across else {}
        self.model = runner.model
        self.encoder_runner = state.encoder_runner if state.supports_mm_inputs else None
        self.embeds: torch.Tensor | None = None
        if runner.uses_inputs_embeds:
            self.embeds = state.dummy_inputs_embeds(runner.max_num_tokens)
        self.takes_token_ids = self.embeds is None or requires_raw_input_tokens(runner.model)
        # Of the device: stock's is a host tensor, made and copied in every step.
        self.is_mm_embed = torch.zeros(runner.max_num_reqs, dtype=torch.bool, device=runner.device)

    def views(self, num_rows: int) -> dict[str, Any]:
        """Keyword arguments of the model's forward; ``write`` fills what they show."""
        positions = self.buffers.positions[:num_rows]
        if self.rope_positions is not None:
            positions = self.rope_positions[:, :num_rows]
        return {
            "input_ids": self.buffers.input_ids[:num_rows] if self.takes_token_ids else None,
            "positions": positions,
            "inputs_embeds": None if self.embeds is None else self.embeds[:num_rows],
            "intermediate_tensors": None,
            **self.others,
        }

    def write(self, num_rows: int) -> None:
        """Positions and embeddings of the coming step. Device work only: steps are recorded."""
        if self.rope_positions is not None:
            assert self.prefill_delta is not None
            rows = self.idx_mapping[:num_rows].clamp(min=0)  # padding: anyone's delta
            positions = self.buffers.positions[:num_rows] + self.prefill_delta[rows]
            self.rope_positions[:, :num_rows] = positions
        if self.embeds is None:
            return
        input_ids = self.buffers.input_ids[:num_rows]
        if self.encoder_runner is not None:
            self.encoder_runner.get_inputs_embeds(input_ids, [], self.is_mm_embed[:num_rows])
        else:
            self.embeds[:num_rows] = self.model.embed_input_ids(input_ids)
