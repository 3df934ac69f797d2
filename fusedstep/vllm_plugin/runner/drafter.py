"""The drafters of speculative rounds: vLLM's own, and its draft model without its host's work."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from vllm.forward_context import (
    BatchDescriptor,
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator
from vllm.v1.worker.gpu.spec_decode.utils import get_drafter_hidden_states

from fusedstep.ops.types import RowTokens, TokenInputs, WindowRows
from fusedstep.vllm_plugin.runner.decode_model import in_place, map_block_tables
from fusedstep.window.graphs import Graph, Recorder

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner


class PlaceOps(Protocol):
    """The part of the step operations that places tokens."""

    def place(self, rows: WindowRows, num_reqs: int, out: TokenInputs, tokens: RowTokens) -> None:
        """Write these tokens of each row."""


class Verified(NamedTuple):
    """All that a drafter may ask of the round that was just verified."""

    batch: InputBatch
    attn_metadata: dict[str, Any]
    slots_by_layer: dict[str, torch.Tensor]
    hidden_states: Any
    aux_hidden_states: Any
    num_tokens: torch.Tensor  # [num_reqs] int32, that each row took; 0 of a row at rest


class Drafter(Protocol):
    """Drafts the tokens that the next round verifies."""

    @property
    def is_recordable(self) -> bool:
        """Is ``launch`` nothing but device work, at fixed addresses?"""

    @property
    def sizes(self) -> Collection[int]:
        """Rows with padding of the batches whose drafts are recorded, each round's alone."""

    def stage(self, num_reqs: int) -> None:
        """A window starts; its rows are staged."""

    def plan(self, num_rows: int) -> None:
        """Its batch has so many rows, with padding."""

    def plan_to_record(self, num_rows: int) -> None:
        """The same, for graphs that will read what is planned here; every row is at rest."""

    def propose(self, verified: Verified) -> torch.Tensor:
        """[num_reqs, drafts] int64, by batch_idx."""

    def launch(self, verified: Verified) -> torch.Tensor:
        """The same without a graph: it is recorded itself, with the round."""


class StockDrafter:
    """vLLM's own, in its own graphs. It plans each of its forwards; n-gram has none."""

    sizes: Collection[int] = ()

    def __init__(self, runner: GPUModelRunner) -> None:
        self.runner = runner

    @property
    def is_recordable(self) -> bool:
        return type(self.runner.speculator) is NgramGPUSpeculator

    def stage(self, num_reqs: int) -> None:
        pass

    def plan(self, num_rows: int) -> None:
        pass

    def plan_to_record(self, num_rows: int) -> None:
        pass

    def launch(self, verified: Verified) -> torch.Tensor:
        return self.propose(verified)

    def propose(self, verified: Verified) -> torch.Tensor:
        runner = self.runner
        states, sampling = runner.req_states, runner.sampler.sampling_states
        num_drafts: int = runner.num_speculative_steps
        # A row at rest drafts behind its first token: whatever, but within its own blocks.
        num_tokens = verified.num_tokens.clamp(min=1)
        drafts: torch.Tensor = runner.speculator.propose(
            verified.batch,
            verified.attn_metadata,
            verified.slots_by_layer,
            self.target_states(verified),
            verified.aux_hidden_states,
            num_tokens,
            1 + num_drafts - num_tokens,
            states.last_sampled_tokens,
            states.next_prefill_tokens,
            sampling.temperature.gpu,
            sampling.seeds.gpu,
            num_speculative_tokens=num_drafts,
        )
        return drafts

    def target_states(self, verified: Verified) -> torch.Tensor:
        """The target's, as vLLM hands them to its drafter."""
        states: torch.Tensor = get_drafter_hidden_states(self.runner.model, verified.hidden_states)
        return states


class _Forward(NamedTuple):
    """One of the draft model's forwards, planned for a window."""

    commons: list[CommonAttentionMetadata]  # by KV cache group
    attn_metadata: dict[str, Any]  # by layer; what the context holds
    context: Any  # vLLM's ForwardContext
    input_ids: torch.Tensor
    positions: torch.Tensor


class DraftModel:
    """vLLM's draft model of its own: the same forwards and draws, planned once for a window.

    The first forward of a round reads the tokens that the row took, the others a draft each. On a
    GPU all of it is one CUDA graph where the attention moves its metadata along on the device; vLLM
    itself launches this drafter call by call.
    """

    def __init__(self, runner: GPUModelRunner, ops: PlaceOps, rows: WindowRows) -> None:
        self.runner, self.ops, self.rows = runner, ops, rows
        self.speculator: StandaloneARSpeculator = runner.speculator
        self.model: Any = self.speculator.model
        self.num_drafts: int = runner.num_speculative_steps
        self.width = self.num_drafts + 2  # a round's tokens, and the one it took behind them
        size, device = runner.max_num_reqs, runner.device
        num_groups = len(runner.kv_cache_config.kv_cache_groups)
        self.inputs = TokenInputs.allocate(size, size * self.width, num_groups, device)
        self.slots_by_layer = build_slot_mappings_by_layer(
            self.inputs.slot_mappings, runner.kv_cache_config
        )
        self.groups = [g for groups in self.speculator.attn_groups for g in groups]
        self.updates_in_place = all(map(in_place, self.groups))
        each = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.starts = {width: each * width for width in (1, self.width)}
        self.starts_cpu = {width: starts.cpu() for width, starts in self.starts.items()}
        self.upper_bound = torch.full(
            (size,), runner.max_model_len, dtype=torch.int32, device="cpu"
        )
        self.back = torch.zeros(size, dtype=torch.int32, device=device)
        self.graphs: dict[int, Graph] = {}  # by rows with padding
        self.read_by_graphs: list[_Forward | None] = []  # their tensors must stay where they are
        self.num_rows = 0
        self.first: _Forward | None = None
        self.next: _Forward | None = None
        # The kernel is compiled before a request waits for it. No row is active.
        drafts = self.speculator.draft_tokens
        ops.place(rows, 1, self.inputs, RowTokens(self.width, drafts, 0, back=self.back[:1]))
        ops.place(rows, 1, self.inputs, RowTokens(1, drafts, 1, ahead=1))

    @property
    def is_recordable(self) -> bool:
        return self.updates_in_place

    @property
    def sizes(self) -> Collection[int]:
        return self.graphs

    def stage(self, num_reqs: int) -> None:
        speculator, sampling = self.speculator, self.runner.sampler.sampling_states
        speculator._copy_request_inputs(
            num_reqs, self.rows.idx_mapping[:num_reqs], sampling.temperature.gpu, sampling.seeds.gpu
        )
        map_block_tables(self.runner, self.groups)

    def plan(self, num_rows: int) -> None:
        self.num_rows = num_rows
        if num_rows not in self.graphs:
            self._plan(num_rows)

    def propose(self, verified: Verified) -> torch.Tensor:
        return self._drafts(verified, self.graphs.get(self.num_rows))

    def launch(self, verified: Verified) -> torch.Tensor:
        return self._drafts(verified, None)

    def _drafts(self, verified: Verified, graph: Graph | None) -> torch.Tensor:
        num_reqs = len(verified.num_tokens)
        self.back[:num_reqs] = verified.num_tokens
        if graph is None:
            self._draft(self.num_rows)
        else:
            graph.replay()
        drafts: torch.Tensor = self.speculator.draft_tokens[:num_reqs]
        return drafts

    def record(self, recorder: Recorder, sizes: list[int]) -> None:
        """Record the drafts of batches of so many rows, each after a run that compiles."""
        for num_rows in sizes:
            self.rows.idx_mapping[:num_rows].fill_(-1)  # only padding: nobody's KV slot
            self.rows.active[:num_rows].fill_(False)
            self.plan_to_record(num_rows)
            self._draft(num_rows)
            self.graphs[num_rows] = recorder.record(partial(self._draft, num_rows))

    def forget_records(self) -> None:
        """The host launches each draft."""
        self.graphs.clear()
        self.read_by_graphs.clear()

    def plan_to_record(self, num_rows: int) -> None:
        self.speculator.idx_mapping.fill_(-1)
        self.num_rows = num_rows
        self._plan(num_rows)
        self.read_by_graphs += [self.first, self.next]

    def _plan(self, num_rows: int) -> None:
        self.first = self._forward(num_rows, self.width)
        self.next = self._forward(num_rows, 1)

    def _forward(self, num_rows: int, width: int) -> _Forward:
        """As ``StandaloneARSpeculator`` describes its batch to the attention."""
        runner, speculator, inputs = self.runner, self.speculator, self.inputs
        num_tokens = num_rows * width
        commons = [
            CommonAttentionMetadata(
                query_start_loc=self.starts[width][: num_rows + 1],
                query_start_loc_cpu=self.starts_cpu[width][: num_rows + 1],
                seq_lens=inputs.seq_lens[:num_rows],
                seq_lens_cpu_upper_bound=self.upper_bound[:num_rows],
                max_seq_len=speculator.draft_max_seq_len,
                num_reqs=num_rows,
                num_actual_tokens=num_tokens,
                max_query_len=width,
                block_table_tensor=block_table[:num_rows],
                slot_mapping=slot_mapping[:num_tokens],
                positions=inputs.positions[:num_tokens],
                is_prefilling=speculator.draft_is_prefilling[:num_rows],
            )
            for block_table, slot_mapping in zip(
                runner.block_tables.input_block_tables, inputs.slot_mappings, strict=True
            )
        ]
        attn_metadata: dict[str, Any] = {}
        self._build(commons, attn_metadata)
        with set_forward_context(
            attn_metadata,
            runner.vllm_config,
            num_tokens=num_tokens,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
            slot_mapping=self.slots_by_layer,
        ):
            context = get_forward_context()
        ids, positions = inputs.input_ids[:num_tokens], inputs.positions[:num_tokens]
        return _Forward(commons, attn_metadata, context, ids, positions)

    def _build(self, commons: list[CommonAttentionMetadata], attn_metadata: dict[str, Any]) -> None:
        for group in self.groups:
            metadata = group.build_metadata(commons[group.kv_cache_group_id], 0)
            attn_metadata.update(dict.fromkeys(group.layer_names, metadata))

    def _draft(self, num_rows: int) -> None:
        """All drafts of a round; nothing but device work where metadata is moved along there."""
        drafts, back = self.speculator.draft_tokens, self.back[:num_rows]
        assert self.first is not None and self.next is not None
        taken = RowTokens(self.width, drafts, 0, back=back)
        self.ops.place(self.rows, num_rows, self.inputs, taken)
        hidden_states = self._run(self.first)
        last = self.inputs.last_sampled[:num_rows]
        self._draw(0, num_rows, hidden_states[last], last)
        for number in range(1, self.num_drafts):
            draft = RowTokens(1, drafts, number, ahead=number)
            self.ops.place(self.rows, num_rows, self.inputs, draft)
            self._draw(number, num_rows, self._run(self.next), None)

    def _run(self, forward: _Forward) -> torch.Tensor:
        if self.updates_in_place:
            for group in self.groups:
                group.update_draft_decode_metadata(forward.attn_metadata)
        else:
            for common in forward.commons:
                common._num_computed_tokens_cache = None
            self._build(forward.commons, forward.attn_metadata)
        with override_forward_context(forward.context):
            output = self.model(input_ids=forward.input_ids, positions=forward.positions)
        hidden_states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden_states

    def _draw(
        self, number: int, num_rows: int, hidden_states: torch.Tensor, at: torch.Tensor | None
    ) -> None:
        """``at``: where each row's last token is; None where it has no other."""
        speculator, positions = self.speculator, self.inputs.positions
        if speculator.draft_logits is not None:  # drawn by position, as vLLM draws
            positions = positions[:num_rows] if at is None else positions[at]
        speculator.current_draft_step.fill_(number)
        speculator.draft_tokens[:num_rows, number] = speculator.sample_draft(
            hidden_states,
            positions,
            speculator.idx_mapping[:num_rows],
            speculator.temperature,
            speculator.seeds,
            speculator.current_draft_step,
            speculator.draft_logits,
        )
