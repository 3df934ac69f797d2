"""Speculative rounds as CUDA graphs: target, verification and drafter without the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import apply_temperature
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import gather_draft_sampled
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

from fusedstep.loop_forms import LoopForm
from fusedstep.ops.types import BatchNeeds, SamplingState, WindowRows
from fusedstep.policy import MAX_STEPS
from fusedstep.vllm_plugin.runner.decode_model import attention_groups, in_place, map_block_tables
from fusedstep.vllm_plugin.runner.drafter import DraftModel, Verified
from fusedstep.vllm_plugin.runner.recording import Form, GraphStore, choose, record_drafts
from fusedstep.vllm_plugin.runner.rounds import Rounds
from fusedstep.vllm_plugin.runner.truncation import allocate_buffers, truncate_as_stock
from fusedstep.window.arrivals import ArrivalCounter
from fusedstep.window.graphs import WindowGraphs
from fusedstep.window.loop import Graphs, run_window
from fusedstep.window.proof import CONTEXT, STEPS, Proof
from fusedstep.window.state import WindowSlot

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

# Of a round's processed logits, which its graph keeps: a larger batch is launched by the host.
MAX_LOGITS_BYTES = 256 << 20
# Nothing but temperature and seeds; top-k and top-p, too; all that vLLM takes.
VARIANTS = (
    BatchNeeds.none(),
    replace(BatchNeeds.none(), truncation=True),
    BatchNeeds.beside_drafts(),
)


class RecordedRounds:
    """``RecordableModel`` and ``StepOps`` of ``fusedstep.window``: a round as device work alone.

    vLLM's own rejection sampler asks the host what each batch needs; the functions that it is made
    of are called here. All that they read has a fixed address.
    """

    def __init__(self, rounds: Rounds) -> None:
        self.rounds, self.runner = rounds, rounds.runner
        self.tables, size = self.runner.tables, self.runner.max_num_reqs
        self.groups = attention_groups(self.runner)
        device = self.runner.device
        # Padding rows read the first request's state: vLLM's kernels know no other padding.
        self.idx_mapping = torch.zeros(size, dtype=torch.int64, device=device)
        self.of_tokens = torch.zeros(size, rounds.width, dtype=torch.int64, device=device)
        self.batch: InputBatch | None = None
        self.attn_metadata: dict[str, Any] = {}
        self.slots_by_layer: dict[str, torch.Tensor] = {}
        self.hidden_states: Any = None
        self.aux_hidden_states: Any = None

    @property
    def obstacle(self) -> str | None:
        """The reason that rounds cannot be recorded here, or None."""
        planners = {g.backend.get_name() for g in self.groups if not in_place(g)}
        if planners:
            return f"{', '.join(sorted(planners))} plans every round on the host"
        if not self.rounds.drafter.is_recordable:
            return "the drafter plans every round on the host"
        if self.rounds.adapters.enabled:
            return "LoRA adapters are set by the host"
        if self.runner.sampler.compute_nans:
            return "VLLM_COMPUTE_NANS_IN_LOGITS is the host's"
        return None

    def allocate(self) -> None:
        """vLLM's buffers for top-k and top-p, which grow to one program per multiprocessor."""
        device, vocab_size = self.runner.device, self.runner.vocab_size
        most = torch.cuda.get_device_properties(device).multi_processor_count
        size = min(self.rounds.width * self.runner.max_num_reqs, most)
        logits = torch.zeros(size, vocab_size, device=device)
        limit_k = torch.full((size,), vocab_size, dtype=torch.int32, device=device)
        allocate_buffers(logits, limit_k, torch.ones(size, device=device))

    @contextmanager
    def capturing(self, num_reqs: int, num_loras: int) -> Iterator[None]:
        """Metadata for any such batch, as vLLM captures its own graphs of this width."""
        assert not num_loras
        rounds, runner = self.rounds, self.runner
        num_tokens = num_reqs * rounds.width
        self.attn_metadata, self.slots_by_layer = prepare_inputs_to_capture(
            num_reqs,
            num_tokens,
            runner.model_state,
            runner.input_buffers,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
            full_cudagraph=True,
            max_query_len=rounds.width,
        )
        rounds.drafter.plan_to_record(num_reqs)
        nobody = np.zeros(num_reqs, np.int64)
        batch = rounds.describe([""] * num_reqs, nobody, self.idx_mapping[:num_reqs])
        # A padding row has tokens of its own, too, for the drafter.
        self.batch = replace(batch, query_start_loc=rounds.starts[: num_reqs + 1])
        with set_forward_context(
            self.attn_metadata,
            runner.vllm_config,
            num_tokens=num_tokens,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
            slot_mapping=self.slots_by_layer,
            is_padding=runner.input_buffers.is_padding[:num_tokens],
        ):
            yield

    def begin_captured(self, num_reqs: int) -> None:
        self.rounds.enter()
        map_block_tables(self.runner, self.groups)

    def begin(self, num_reqs: int) -> None:
        """Of a window that is not recorded: ``Rounds`` runs it."""
        raise AssertionError("these rounds are recorded")

    def end(self) -> None:
        raise AssertionError("these rounds are recorded")

    def prepare(self, rows: WindowRows, num_reqs: int) -> None:
        self.rounds.prepare(rows, num_reqs)

    def plan(self) -> None:
        rounds, batch = self.rounds, self.batch
        assert batch is not None
        rounds.ops.place(rounds.rows, batch.num_reqs, rounds.inputs, rounds.tokens)
        for group in self.groups:
            group.update_draft_decode_metadata(self.attn_metadata)

    def forward(self) -> torch.Tensor:
        batch = self.batch
        assert batch is not None
        output = self.rounds.model(
            input_ids=batch.input_ids,
            positions=batch.positions,
            inputs_embeds=None,
            intermediate_tensors=None,
        )
        self.hidden_states, self.aux_hidden_states = self.rounds.split(output)
        logits: torch.Tensor = self.rounds.model.compute_logits(self.hidden_states)
        return logits

    def step(
        self, logits: torch.Tensor, rows: WindowRows, num_rows: int, needs: BatchNeeds
    ) -> None:
        """Verify the drafts, take the tokens, draft again. ``logits``: [num_rows * width, V]."""
        rounds, batch = self.rounds, self.batch
        assert batch is not None
        tokens, num_tokens = self._verify(logits, rows, batch, needs)
        rounds.ops.accept(tokens, num_tokens, rows, num_rows)
        rounds.taken.add(tokens, num_tokens)
        # A loop on the device ends here: all rows have the same number of rounds.
        rows.num_active.masked_fill_(rounds.taken.number >= rows.steps_allowed[:1], 0)
        verified = Verified(
            batch,
            self.attn_metadata,
            self.slots_by_layer,
            self.hidden_states,
            self.aux_hidden_states,
            num_tokens,
        )
        rounds.drafts[:num_rows] = rounds.drafter.launch(verified)

    def _verify(
        self, logits: torch.Tensor, rows: WindowRows, batch: InputBatch, needs: BatchNeeds
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``RejectionSampler`` of rows past their prefills: [num_rows, width] int64, those that
        hold and one more, and their number [num_rows] int32."""
        verify, sampling = self.rounds.verify, self.tables.state.sampling
        num_rows = batch.num_reqs
        torch.clamp(rows.idx_mapping[:num_rows], min=0, out=batch.idx_mapping)
        self.of_tokens[:num_rows].copy_(batch.idx_mapping[:, None])
        of_tokens = self.of_tokens[:num_rows].view(-1)
        drafts, positions = gather_draft_sampled(
            batch.input_ids,
            batch.positions,
            batch.logits_indices,
            of_tokens,
            batch.expanded_local_pos,
            self.tables.prefill_len,
        )
        logits = torch.empty_like(logits, dtype=torch.float32).copy_(logits)
        if needs.adjustment:
            self.tables.adjust(logits, of_tokens, drafts, positions, batch.expanded_local_pos)
        apply_temperature(logits, of_tokens, sampling.temperature)
        if needs.truncation:
            truncate_as_stock(logits, *self.tables.limits(of_tokens))
        sampled: tuple[torch.Tensor, torch.Tensor] = rejection_sample(
            logits,
            self.runner.speculator.draft_logits,
            drafts,
            batch.cu_num_logits,
            positions,
            batch.idx_mapping,
            of_tokens,
            batch.expanded_local_pos,
            sampling.temperature,
            sampling.seeds,
            self.rounds.num_drafts,
            verify.synthetic_conditional_rates,
            use_fp64=verify.sampler.use_fp64_gumbel,
            use_block_verification=verify.use_block_verification,
        )
        return sampled


class RoundStore(GraphStore):
    """The graphs of an engine's rounds, and those of its drafts alone, for batches that have no
    graph of their rounds."""

    def __init__(
        self, runner: GPUModelRunner, rounds: Rounds, arrivals: ArrivalCounter, loop: str
    ) -> None:
        super().__init__(runner, arrivals, choose(runner, loop))
        self.rounds = rounds
        self.recorded: RecordedRounds | None = None
        if self.form.name.is_recorded:
            self.recorded = RecordedRounds(rounds)
            if (obstacle := self.recorded.obstacle) is not None:
                self.form = Form(LoopForm.EAGER, f"{self.form.name}: {obstacle}")

    def record(self, *, profile_only: bool, prove: bool = True) -> int:
        if self.form.name.is_recorded and not profile_only and not self._sizes():
            reason = f"{self.form.name}: vLLM records no verification of such a size"
            self.form = Form(LoopForm.EAGER, reason)
        if self.recorded is not None and self.form.name.is_recorded:
            self.recorded.allocate()
        drafter, taken = self.rounds.drafter, 0
        if isinstance(drafter, DraftModel) and drafter.is_recordable:
            taken = record_drafts(
                self.runner,
                drafter,
                self.rounds.graph_sizes(),
                self.arrivals,
                profile_only=profile_only,
            )
        taken += super().record(profile_only=profile_only, prove=prove)
        recorded = () if self.graphs is None else self._sizes()
        self.rounds.pad_to({*drafter.sizes, *recorded})
        return taken

    def _made_up(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _batches(self) -> list[tuple[int, int]]:
        return [(n, 0) for n in self._sizes()]

    def _sizes(self) -> list[int]:
        """Rows with padding, the largest first."""
        row_bytes = self.rounds.width * self.runner.vocab_size * 4
        return [n for n in self.rounds.graph_sizes() if n * row_bytes <= MAX_LOGITS_BYTES]

    def _new_graphs(self) -> WindowGraphs:
        assert self.recorded is not None
        windows = self.runner.windows
        return WindowGraphs(self.form.name, self.recorded, self.recorded, windows, VARIANTS)

    def prove(self) -> None:
        """The smallest and the largest batch. Raises WrongTokensError. Overwrites KV blocks."""
        if self.graphs is None:
            return
        sizes = self._sizes()
        for num_rows in {sizes[-1], sizes[0]}:
            RoundProof(self.runner, self.rounds, self.graphs, sizes).check(num_rows)


class RoundProof(Proof):
    """Runs made-up requests in rounds that the host launches, and in recorded ones."""

    def __init__(
        self, runner: GPUModelRunner, rounds: Rounds, graphs: WindowGraphs, sizes: list[int]
    ) -> None:
        self.runner, self.rounds, self.sizes = runner, rounds, sizes
        super().__init__(
            runner.tables.state,
            graphs,
            runner.kv_cache_config.num_blocks - 1,  # block 0 is vLLM's null block
            self._stage,
            runner.copy_stream,
            runner.pace,
            steps=min(STEPS, MAX_STEPS // rounds.width),
            tokens_per_step=rounds.width,
        )

    def _make_up(self, num_reqs: int, needs: BatchNeeds) -> None:
        """vLLM's sampler has the made-up requests, too. It counts tokens, which start anew then."""
        asked = {
            name: spec.on
            for name, spec in SamplingState.parameters().items()
            if spec.on is not None and spec.need is not None and getattr(needs, spec.need)
        }
        for row in range(num_reqs):
            params = SamplingParams(temperature=row % 2, seed=1000 + row, **asked)
            self.runner.sampler.add_request(row, params)
        self.runner.sampler.apply_staged_writes()
        super()._make_up(num_reqs, needs)

    def _stage(self, seq_lens: np.ndarray, num_steps: int) -> tuple[int, int]:
        """Rows that have no drafts yet, and no logits of them."""
        rows = np.arange(len(seq_lens))
        states, speculator = self.runner.req_states, self.runner.speculator
        states.num_computed_tokens_np[rows] = CONTEXT
        states.draft_tokens[: len(rows)] = 0
        if speculator.draft_logits is not None:
            speculator.draft_logits[: len(rows)] = 0
        self.rounds.pad_to(set(self.sizes))
        return self.rounds.stage([""] * len(rows), rows, num_steps, BatchNeeds.none()), 0

    def _window(self, slot: WindowSlot, graphs: Graphs | None) -> list[list[int]]:
        run_window(self.rounds, self.rounds, slot, lambda: False, self.pace, graphs)
        output = self.rounds.output
        output.keep(self.rounds.taken, slot.steps_run, self.stream)
        return output.read(slot.num_reqs).token_ids
