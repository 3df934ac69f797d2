"""vLLM's model as the loop sees it: one decode step from static buffers, attention in step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

from fusedstep.ops.types import WindowRows
from fusedstep.vllm_plugin.runner.adapters import Adapters
from fusedstep.vllm_plugin.runner.cross_attention import EncoderLengths, attends_across
from fusedstep.vllm_plugin.runner.experts import RoutedExperts
from fusedstep.vllm_plugin.runner.model_inputs import ModelInputs
from fusedstep.vllm_plugin.runner.recurrent import RecurrentState, is_recurrent

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.utils import AttentionGroup


def attention_groups(runner: GPUModelRunner) -> list[AttentionGroup]:
    """Layers that attend, and share a backend and a KV-cache group."""
    return [g for groups in runner.attn_groups for g in groups if not is_recurrent(g)]


def in_place(group: AttentionGroup) -> bool:
    """Can this backend move its metadata along on the device?"""
    return bool(group.supports_draft_decode_metadata_update)


def map_block_tables(runner: GPUModelRunner, groups: list[AttentionGroup]) -> None:
    """Graphs read a window's block tables where each of these groups' kernels expects them."""
    for group in groups:
        group.map_to_kernel_block_table(
            runner.block_tables.input_block_tables[group.kv_cache_group_id]
        )


def decode_graph(runner: GPUModelRunner, num_reqs: int, num_loras: int, width: int = 1) -> Any:
    """vLLM's graph for a step of such a batch, of ``width`` tokens each; its mode is NONE where
    there is none."""
    return runner.cudagraph_manager.dispatch(
        num_reqs,
        num_reqs * width,
        uniform_token_count=width,
        num_active_loras=num_loras,
        max_query_len=width,
    )


def padded_rows(graph: Any, max_num_reqs: int) -> int:
    """Rows of a batch that takes this graph of vLLM's.

    Graphs for prefills, too (PIECEWISE, or cudagraph_mode FULL) have sizes above max_num_reqs.
    """
    return min(int(graph.num_tokens), max_num_reqs)


class VllmDecodeModel:
    """``fusedstep.window.loop.DecodeModel`` for a model of Model Runner V2.

    The forward context is entered once per window. Per step only the attention metadata moves: in
    place where every backend can, as vLLM's drafters do it; else each group's builder plans again
    from the ``seq_lens`` that the step wrote. The forward of a step that is not recorded itself is
    what vLLM's own step has for such a batch: its full graph, its piecewise one, or plain calls.
    """

    def __init__(
        self,
        runner: GPUModelRunner,
        model_inputs: ModelInputs,
        rows: WindowRows,
        experts: RoutedExperts | None = None,  # None: nobody asks for them
        *,
        use_graphs: bool,
    ) -> None:
        self.runner = runner
        self.model = runner.model
        self.experts = experts
        self.model_inputs = model_inputs
        self.buffers = runner.input_buffers
        self.query_start_loc = torch.arange(
            runner.max_num_reqs + 1, dtype=torch.int32, device=runner.device
        )
        self.query_start_loc_cpu = self.query_start_loc.cpu()
        self.is_prefilling = torch.zeros(runner.max_num_reqs, dtype=torch.bool)
        self.seq_lens_upper_bound = np.zeros(runner.max_num_reqs, dtype=np.int32)
        self.use_graphs = use_graphs
        self.adapters = Adapters(runner)
        groups = attention_groups(runner)
        across = [group for group in groups if attends_across(group)]
        self.encoder_lengths = EncoderLengths(runner, across) if across else None
        self.groups = [group for group in groups if group not in across]  # planned in every step
        self.updates_in_place = all(map(in_place, self.groups))
        recurrent = [g for groups in runner.attn_groups for g in groups if is_recurrent(g)]
        self.recurrent = RecurrentState(runner, recurrent, rows) if recurrent else None
        self.num_reqs = 0  # without padding
        self.num_rows = 0  # with it
        self.num_tokens_across_dp: torch.Tensor | None = None  # of each data-parallel rank
        self.num_tokens = 0  # of the forward: those of the rows, then those of a larger graph
        self.graph: Any = None  # of vLLM, for this window's padded batch
        self.common: list[CommonAttentionMetadata] = []
        self.attn_metadata: dict[str, Any] = {}
        self.context: AbstractContextManager[None] | None = None
        self.inputs: dict[str, Any] = {}

    @property
    def gives_way(self) -> bool:
        """May a window end before its first step?

        Not where recurrent states are cached: vLLM lets the next turn's requests begin from a block
        that this window's first step completes. Keys are there in time, a state is not.
        """
        return self.recurrent is None or self.recurrent.aligned is None

    def stage(
        self,
        seq_lens: np.ndarray,  # [num_reqs] int32, upper bound in the first step
        num_steps: int,
    ) -> tuple[int, int]:
        """Host part: lengths without asking the device; after ``adapters.stage``.

        Returns the rows with padding, and the adapters that the batch's graph is for.
        """
        self.num_reqs = num_reqs = len(seq_lens)
        self.graph = None
        self.num_tokens = num_rows = num_reqs
        runner, num_loras = self.runner, self.adapters.num_active
        if self.use_graphs and num_reqs and runner.cudagraph_manager is not None:
            graph = decode_graph(runner, num_reqs, num_loras)
            num_loras = graph.num_active_loras
            if graph.cg_mode != CUDAGraphMode.NONE:
                self.graph, self.num_tokens = graph, graph.num_tokens
                num_rows = padded_rows(graph, runner.max_num_reqs)
        self.seq_lens_upper_bound[:num_reqs] = seq_lens
        self.seq_lens_upper_bound[num_reqs:num_rows] = 0
        if self.updates_in_place:  # planned once: for the last step's lengths
            self.seq_lens_upper_bound[:num_reqs] += max(num_steps - 1, 0)
        return num_rows, num_loras

    def join_ranks(self, num_tokens: torch.Tensor) -> None:
        """Tokens of each data-parallel rank, [num_ranks] int32 on the host, in every step."""
        self.num_tokens_across_dp = num_tokens

    def begin(self, num_reqs: int) -> None:
        runner, buffers = self.runner, self.buffers
        if self.recurrent is not None:
            self.recurrent.begin()
        slot_mappings = runner.block_tables.slot_mappings[:, : self.num_tokens]
        upper_bound = torch.from_numpy(self.seq_lens_upper_bound[:num_reqs])
        self._describe_rows(num_reqs, self.num_tokens)
        self.adapters.apply()
        self.common = [
            CommonAttentionMetadata(
                query_start_loc=buffers.query_start_loc[: num_reqs + 1],
                query_start_loc_cpu=self.query_start_loc_cpu[: num_reqs + 1],
                seq_lens=buffers.seq_lens[:num_reqs],
                seq_lens_cpu_upper_bound=upper_bound,
                max_seq_len=int(upper_bound.max()),
                num_reqs=num_reqs,
                num_actual_tokens=num_reqs,
                max_query_len=1,
                block_table_tensor=block_table[:num_reqs],
                slot_mapping=slot_mapping,
                positions=buffers.positions[: self.num_tokens],
                is_prefilling=self.is_prefilling[:num_reqs],
            )
            for block_table, slot_mapping in zip(
                runner.block_tables.input_block_tables, slot_mappings, strict=True
            )
        ]
        if self.encoder_lengths is not None:
            self.encoder_lengths.describe(self.common)
        self.attn_metadata = {}
        slots_by_layer = build_slot_mappings_by_layer(slot_mappings, runner.kv_cache_config)
        self._enter(num_reqs, slots_by_layer)

    def plan(self) -> None:
        if self.recurrent is not None:
            self.recurrent.prepare_step(self.num_rows)
        if not self.attn_metadata:
            for groups in self.runner.attn_groups:
                self._build(groups)
            return
        if self.recurrent is not None:
            self.recurrent.move_along(self.attn_metadata, self.num_rows)
        if self.updates_in_place:
            for group in self.groups:
                group.update_draft_decode_metadata(self.attn_metadata)
        else:
            self.seq_lens_upper_bound[: self.num_rows] += 1
            for common in self.common:
                common.max_seq_len += 1
                common._num_computed_tokens_cache = None
            self._build(self.groups)

    def forward(self) -> torch.Tensor:
        self.model_inputs.write(self.num_rows)
        if self.graph is None:
            hidden_states = self.model(**self.inputs)
        elif self.graph.cg_mode == CUDAGraphMode.PIECEWISE:
            hidden_states = self.runner.cudagraph_manager.run_pw_graph(self.model, self.inputs)
        else:
            hidden_states = self.runner.cudagraph_manager.run_fullgraph(self.graph)
        if self.experts is not None:
            self.experts.keep(self.num_rows)
        logits: torch.Tensor = self.model.compute_logits(hidden_states[: self.num_rows])
        return logits

    def forget_states(self, num_blocks: int) -> None:
        """Zero the recurrent states in the first blocks, which no request may own."""
        if self.recurrent is not None:
            self.recurrent.forget(num_blocks)

    def end(self) -> None:
        assert self.context is not None
        self.context.__exit__(None, None, None)
        self.context = None

    @contextmanager
    def capturing(self, num_reqs: int, num_loras: int) -> Iterator[None]:
        """Metadata for any such batch, as vLLM captures its own decode graphs.

        Its builder has set it up; what the recorded ``plan`` does is to move it along in place.
        """
        runner = self.runner
        self.adapters.make_up(num_loras, num_reqs)
        self.adapters.apply()
        self.attn_metadata, slots_by_layer = prepare_inputs_to_capture(
            num_reqs,
            num_reqs,
            runner.model_state,
            self.buffers,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
            full_cudagraph=True,
            max_query_len=1,
        )
        self.graph, self.num_tokens = None, num_reqs
        self._enter(num_reqs, slots_by_layer)
        try:
            yield
        finally:
            self.end()

    def begin_captured(self, num_reqs: int) -> None:
        self._describe_rows(num_reqs, num_reqs)
        self.adapters.apply()
        map_block_tables(self.runner, self.groups)

    def _describe_rows(self, num_rows: int, num_tokens: int) -> None:
        """One token per row, and which tokens are padding."""
        self.buffers.query_start_loc[: num_rows + 1] = self.query_start_loc[: num_rows + 1]
        self.buffers.is_padding[: self.num_reqs].fill_(False)
        self.buffers.is_padding[self.num_reqs : num_tokens].fill_(True)

    def _enter(self, num_reqs: int, slots_by_layer: dict[str, torch.Tensor]) -> None:
        self.num_rows = num_reqs
        self.inputs = self.model_inputs.views(self.num_tokens)
        mode, num_loras = CUDAGraphMode.NONE, self.adapters.num_active
        if self.graph is not None and self.graph.cg_mode == CUDAGraphMode.PIECEWISE:
            mode, num_loras = self.graph.cg_mode, self.graph.num_active_loras
        self.context = set_forward_context(
            self.attn_metadata,
            self.runner.vllm_config,
            num_tokens=self.num_tokens,
            num_tokens_across_dp=self.num_tokens_across_dp,
            cudagraph_runtime_mode=mode,
            batch_descriptor=BatchDescriptor(
                num_tokens=self.num_tokens,
                has_lora=self.adapters.enabled,
                num_active_loras=num_loras,
            ),
            slot_mapping=slots_by_layer,
            is_padding=self.buffers.is_padding[: self.num_tokens],
        )
        self.context.__enter__()

    def _build(self, groups: list[AttentionGroup]) -> None:
        """Attention metadata of the coming step, by layer."""
        for group in groups:
            metadata = group.build_metadata(self.common[group.kv_cache_group_id], 0)
            self.attn_metadata.update(dict.fromkeys(group.layer_names, metadata))
