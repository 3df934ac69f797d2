"""Speculative rounds: a window of them runs in the same loop as one of decode steps.

A round verifies a row's last token and its drafts in one forward, takes what vLLM's own rejection
sampler lets through, and asks vLLM's own drafter for the next drafts. So its random numbers, and
its tokens, are those of a stock step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.mtp.speculator import MTPSpeculator
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from fusedstep.ops.greedy import verify_greedy
from fusedstep.ops.types import BatchNeeds, RowTokens, StepInputs, TokenInputs, WindowRows
from fusedstep.vllm_plugin.runner.adapters import Adapters
from fusedstep.vllm_plugin.runner.decode_model import decode_graph
from fusedstep.vllm_plugin.runner.drafter import (
    Drafter,
    DraftModel,
    PlaceOps,
    StockDrafter,
    Verified,
)
from fusedstep.vllm_plugin.runner.head_drafter import HeadDrafter
from fusedstep.vllm_plugin.runner.logprobs import Logprobs, take_down
from fusedstep.window.loop import Record
from fusedstep.window.rounds import HostRounds, RoundTokens
from fusedstep.window.state import WindowSlot

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner


class RoundOps(PlaceOps, Protocol):
    """The part of the step operations that a round uses."""

    def prepare(self, rows: WindowRows, num_reqs: int) -> None:
        """The active flags."""

    def accept(
        self, tokens: torch.Tensor, num_tokens: torch.Tensor, rows: WindowRows, num_reqs: int
    ) -> None:
        """Take a round's tokens; the stop rule."""


def make_drafter(runner: GPUModelRunner, ops: PlaceOps, rows: WindowRows) -> Drafter:
    """The leanest drafter that there is for this engine."""
    kind = type(runner.speculator)
    if kind is StandaloneARSpeculator and runner.speculator.dcp_size == 1:
        return DraftModel(runner, ops, rows)
    if kind in (EagleSpeculator, MTPSpeculator):
        return HeadDrafter(runner, rows)
    return StockDrafter(runner)


class Rounds:
    """``DecodeModel`` and ``StepOps`` of ``fusedstep.window.loop``, in one: a step is a round.

    What a round needs of the host is the same for all rounds of a window, but for an upper bound of
    the lengths. A row that has stopped goes on in the batch: it writes no key, takes no token, and
    its drafts are nobody's.

    This is the round that the host launches; ``recorded_rounds.py`` has the one that is a graph.
    The forward is what vLLM's own step has for such a batch: its full graph, its piecewise one, or
    plain calls; so are the drafter's.
    """

    def __init__(
        self,
        runner: GPUModelRunner,
        ops: RoundOps,
        rows: WindowRows,
        inputs: StepInputs,
        *,
        use_graphs: bool,
    ) -> None:
        self.runner, self.ops, self.rows = runner, ops, rows
        self.model, self.verify = runner.model, runner.rejection_sampler
        self.adapters = Adapters(runner)  # the target's; a drafter has none
        device, max_num_reqs = runner.device, runner.max_num_reqs
        self.num_drafts: int = runner.num_speculative_steps
        self.width = 1 + self.num_drafts
        self.starts = torch.arange(max_num_reqs + 1, dtype=torch.int32, device=device) * self.width
        self.starts_np = np.arange(max_num_reqs + 1, dtype=np.int32) * self.width
        self.local_pos = torch.arange(self.width, dtype=torch.int32, device=device).repeat(
            max_num_reqs
        )
        self.all_tokens = torch.arange(max_num_reqs * self.width, device=device)
        self.inputs = TokenInputs(
            inputs.input_ids,
            inputs.positions,
            inputs.seq_lens,
            inputs.slot_mappings,
            last_sampled=torch.zeros_like(inputs.seq_lens, dtype=torch.int64),
        )
        self.drafts = torch.zeros(  # by batch_idx
            max_num_reqs, self.num_drafts, dtype=torch.int64, device=device
        )
        self.drafter = make_drafter(runner, ops, rows)
        self.taken = RoundTokens(max_num_reqs, self.width, device)
        self.outputs = tuple(HostRounds(max_num_reqs, self.width, device) for _ in range(2))
        self.output = self.outputs[0]  # of the window that runs
        # Kernels are compiled before a request waits for them. No row is active.
        ops.accept(self.taken.tokens[0, :1], self.taken.num_tokens[0, :1], rows, 1)
        self.tokens = RowTokens(self.width, self.drafts, self.num_drafts)  # that a round verifies
        ops.place(rows, 1, self.inputs, self.tokens)
        self.sizes: set[int] = set()
        self.use_graphs = use_graphs
        self.graph: Any = None  # of vLLM, for this window's batch
        # Without vLLM's kernels for drafts, which cost the host more than the device.
        self.may_be_greedy = (
            device.type == "cpu"
            and self.verify.synthetic_conditional_rates is None
            and not runner.sampler.compute_nans
        )
        self.is_greedy = False
        self.batch: InputBatch | None = None
        self.req_ids: list[str] = []
        self.reqs = np.zeros(0, np.int64)  # [num_reqs], batch_idx -> req_state_idx
        self.attn_metadata: dict[str, Any] = {}
        self.slots_by_layer: dict[str, torch.Tensor] = {}
        self.block_tables: tuple[torch.Tensor, ...] = ()
        self.hidden_states: Any = None
        self.aux_hidden_states: Any = None
        self.scores: LogprobsTensors | None = None  # of the round's tokens, if they are asked for

    def stage(
        self, req_ids: list[str], reqs: np.ndarray, num_rounds: int, needs: BatchNeeds
    ) -> int:
        """Host part of a window; ``needs`` are those of its requests. Returns rows with padding."""
        self.req_ids, self.reqs = req_ids, reqs
        self.adapters.stage(reqs, self.width)
        sampler = self.runner.sampler
        asked = Logprobs.wanted(sampler, reqs)
        temperature = sampler.sampling_states.temperature.np[reqs]
        is_plain = needs == BatchNeeds.none() and asked is None and not temperature.any()
        self.is_greedy = self.may_be_greedy and is_plain
        self.output = self.outputs[self.output is self.outputs[0]]
        num_logprobs = -1 if asked is None else asked.num_logprobs
        self.output.begin(num_rounds, len(reqs), num_logprobs, has_grammars=needs.grammar)
        return next((n for n in sorted(self.sizes) if n >= len(reqs)), len(reqs))

    def prepare(self, rows: WindowRows, num_reqs: int) -> None:
        self.ops.prepare(rows, num_reqs)
        self.taken.begin()

    def pad_to(self, sizes: set[int]) -> None:
        """Rows of the batches that are recorded, or their drafts."""
        self.sizes = sizes

    def graph_sizes(self) -> list[int]:
        """Rows with padding of the batches whose verification vLLM has recorded, the largest
        first."""
        runner = self.runner
        if not self.use_graphs or runner.cudagraph_manager is None:
            return []
        graphs = [decode_graph(runner, n, 0, self.width) for n in range(1, runner.max_num_reqs + 1)]
        full = [graph for graph in graphs if graph.cg_mode == CUDAGraphMode.FULL]
        return sorted({graph.num_reqs for graph in full}, reverse=True)

    def begin(self, num_rows: int) -> None:
        runner, num_reqs = self.runner, len(self.reqs)
        self.graph = None
        if self.use_graphs and runner.cudagraph_manager is not None:
            graph = decode_graph(runner, num_reqs, self.adapters.num_active, self.width)
            self.graph = None if graph.cg_mode == CUDAGraphMode.NONE else graph
        self.enter()
        self.adapters.apply()
        assert self.batch is not None
        padded = self.batch.num_reqs_after_padding
        self.block_tables = tuple(t[:padded] for t in runner.block_tables.input_block_tables)
        self.drafter.plan(num_rows)

    def enter(self) -> None:
        """All that the rounds of a window read beside its rows, recorded or not."""
        runner, num_reqs = self.runner, len(self.reqs)
        num_tokens = num_reqs * self.width
        self.batch = self.describe(self.req_ids, self.reqs, self.rows.idx_mapping[:num_reqs])
        self.drafts[:num_reqs] = runner.req_states.draft_tokens[self.batch.idx_mapping]
        self.drafter.stage(num_reqs)
        buffers = runner.input_buffers
        buffers.query_start_loc[: num_reqs + 1] = self.starts[: num_reqs + 1]
        buffers.query_start_loc[num_reqs + 1 :] = num_tokens
        buffers.is_padding[:num_tokens].fill_(False)
        buffers.is_padding[num_tokens:].fill_(True)

    @property
    def mode(self) -> Any:
        """vLLM's word for the graph that a forward takes."""
        return CUDAGraphMode.NONE if self.graph is None else self.graph.cg_mode

    def plan(self) -> None:
        runner, batch, inputs = self.runner, self.batch, self.inputs
        assert batch is not None
        self.ops.place(self.rows, batch.num_reqs, inputs, self.tokens)
        slot_mappings = inputs.slot_mappings[:, : batch.num_tokens_after_padding]
        self.slots_by_layer = build_slot_mappings_by_layer(slot_mappings, runner.kv_cache_config)
        batch.seq_lens_cpu_upper_bound[: batch.num_reqs] += self.width
        self.attn_metadata = runner.model_state.prepare_attn(
            batch,
            self.mode,
            self.block_tables,
            slot_mappings,
            runner.attn_groups,
            runner.kv_cache_config,
        )

    def forward(self) -> torch.Tensor:
        runner, batch = self.runner, self.batch
        assert batch is not None
        if self.mode == CUDAGraphMode.FULL:
            output = runner.cudagraph_manager.run_fullgraph(self.graph)
        else:
            output = self._call(batch)
        self.hidden_states, self.aux_hidden_states = self.split(output)
        logits: torch.Tensor = self.model.compute_logits(self.hidden_states[: batch.num_tokens])
        return logits

    def split(self, output: Any) -> tuple[Any, Any]:
        """The model's hidden states, and those of layers that the drafter reads, or None."""
        return output if self.runner.use_aux_hidden_state_outputs else (output, None)

    def _call(self, batch: InputBatch) -> Any:
        """The model's output, by a piecewise graph or without one."""
        runner = self.runner
        inputs = {
            "input_ids": batch.input_ids,
            "positions": batch.positions,
            "inputs_embeds": None,
            "intermediate_tensors": None,
        }
        num_loras = self.adapters.num_active
        if self.graph is not None:
            num_loras = self.graph.num_active_loras
        with set_forward_context(
            self.attn_metadata,
            runner.vllm_config,
            num_tokens=batch.num_tokens_after_padding,
            cudagraph_runtime_mode=self.mode,
            batch_descriptor=BatchDescriptor(
                num_tokens=batch.num_tokens_after_padding,
                has_lora=self.adapters.enabled,
                num_active_loras=num_loras,
            ),
            slot_mapping=self.slots_by_layer,
            is_padding=batch.is_padding,
        ):
            if self.mode == CUDAGraphMode.PIECEWISE:
                return runner.cudagraph_manager.run_pw_graph(self.model, inputs)
            return self.model(**inputs)

    def step(
        self, logits: torch.Tensor, rows: WindowRows, num_rows: int, needs: BatchNeeds
    ) -> None:
        """Verify the drafts, take the tokens, draft again. ``logits``: [num_reqs * width, V].

        Padding rows are the drafter's only.
        """
        runner, batch = self.runner, self.batch
        assert batch is not None
        num_reqs, num_drafts = batch.num_reqs, None
        if self.is_greedy:
            tokens, num_tokens = verify_greedy(logits, self.drafts[:num_reqs])
        else:
            invalid = None
            if needs.grammar:
                invalid = runner.masks.constrain_drafts(logits, batch, runner.grammars)
                num_drafts = self.num_drafts - invalid.view(num_reqs, self.width).sum(1)
            sampled = self.verify(logits, batch, runner.speculator.draft_logits, invalid)
            tokens, num_tokens = sampled.sampled_token_ids, sampled.num_sampled
            self.scores = sampled.logprobs_tensors
        self.ops.accept(tokens, num_tokens, rows, num_reqs)
        if needs.grammar:
            runner.masks.follow(batch.idx_mapping, tokens, num_tokens)
        self.taken.add(tokens, num_tokens, num_drafts)
        verified = Verified(
            batch,
            self.attn_metadata,
            self.slots_by_layer,
            self.hidden_states,
            self.aux_hidden_states,
            num_tokens,
        )
        self.drafts[:num_reqs] = self.drafter.propose(verified)

    @property
    def record(self) -> Record | None:
        """To be called after each round, which the host then launches; None if nobody asks."""
        return None if self.output.num_logprobs < 0 else self._take_logprobs_down

    def _take_logprobs_down(self, _: torch.Tensor, slot: WindowSlot) -> None:
        assert self.scores is not None
        take_down(self.scores, self.output.logprobs, slot.steps_run)

    def end(self) -> None:
        self.graph = None

    def finish(self, slot: WindowSlot) -> None:
        """A window's work is enqueued: its tokens to the host, its drafts to the next step.

        With synchronous scheduling vLLM asks whose drafts there are.
        """
        self.output.keep(self.taken, slot.steps_run, self.runner.copy_stream)
        if slot.steps_run:
            assert self.batch is not None
            drafts = self.drafts[: self.batch.num_reqs]
            self.runner.req_states.draft_tokens[self.batch.idx_mapping] = drafts
            self.runner.draft_tokens_handler.set_draft_tokens(self.batch, drafts)
        self.batch = None

    def describe(
        self, req_ids: list[str], reqs: np.ndarray, idx_mapping: torch.Tensor
    ) -> InputBatch:
        """As vLLM describes a batch whose rows have all their drafts, padded to its graph."""
        num_reqs = len(reqs)
        runner, buffers = self.runner, self.runner.input_buffers
        states = runner.req_states
        num_tokens = num_reqs * self.width
        num_rows, num_padded = num_reqs, num_tokens
        if self.graph is not None:
            num_rows, num_padded = self.graph.num_reqs or num_reqs, self.graph.num_tokens
        num_computed = states.num_computed_tokens_np[reqs]
        prefill_lens = states.prefill_len.np[reqs]
        starts_np = np.minimum(self.starts_np[: num_rows + 1], num_tokens)
        upper_bound = np.zeros(num_rows, np.int32)
        upper_bound[:num_reqs] = num_computed
        return InputBatch(
            req_ids=req_ids,
            num_reqs=num_reqs,
            num_reqs_after_padding=num_rows,
            idx_mapping=idx_mapping,
            idx_mapping_np=reqs,
            expanded_idx_mapping=idx_mapping.repeat_interleave(self.width),
            expanded_local_pos=self.local_pos[:num_tokens],
            num_scheduled_tokens=np.full(num_reqs, self.width, np.int32),
            num_tokens=num_tokens,
            num_tokens_after_padding=num_padded,
            num_draft_tokens=num_reqs * self.num_drafts,
            num_draft_tokens_per_req=np.full(num_reqs, self.num_drafts, np.int32),
            query_start_loc=buffers.query_start_loc[: num_rows + 1],
            query_start_loc_np=starts_np,
            seq_lens=buffers.seq_lens[:num_rows],
            seq_lens_cpu_upper_bound=torch.from_numpy(upper_bound),
            dcp_local_seq_lens=None,
            num_computed_tokens_np=num_computed,
            prefill_len_np=prefill_lens,
            num_computed_prefill_tokens_np=prefill_lens,
            is_prefilling_np=np.zeros(num_reqs, np.bool_),
            has_prefill=False,
            decode_graph_eligible=True,
            input_ids=buffers.input_ids[:num_padded],
            positions=buffers.positions[:num_padded],
            is_padding=buffers.is_padding[:num_padded],
            logits_indices=self.all_tokens[:num_tokens],
            cu_num_logits=self.starts[: num_reqs + 1],
            cu_num_logits_np=self.starts_np[: num_reqs + 1],
            has_structured_output_reqs=self.output.has_grammars,
            prompt_lens=None,
        )
