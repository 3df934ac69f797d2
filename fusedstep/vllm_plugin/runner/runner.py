"""FusedStepRunner: vLLM's Model Runner V2, with decode batches run as windows of K steps."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from fusedstep.loop_forms import LoopForm
from fusedstep.ops import dispatch, native
from fusedstep.ops.types import BatchNeeds
from fusedstep.policy import MAX_STEPS
from fusedstep.reasons import Reason
from fusedstep.vllm_plugin import compat, reasons, stamps
from fusedstep.vllm_plugin.grammar_tables import grammars_of
from fusedstep.vllm_plugin.runner.decode_model import VllmDecodeModel
from fusedstep.vllm_plugin.runner.experts import RoutedExperts, routed_by
from fusedstep.vllm_plugin.runner.grammars import DeviceMasks, Grammars
from fusedstep.vllm_plugin.runner.logprobs import Logprobs
from fusedstep.vllm_plugin.runner.model_inputs import ModelInputs
from fusedstep.vllm_plugin.runner.output import WindowOutput, one_step_each
from fusedstep.vllm_plugin.runner.parts import batch_reason, metadata_reason, runner_reason
from fusedstep.vllm_plugin.runner.processing import Processing
from fusedstep.vllm_plugin.runner.ranks import JOINS, Agreement, Ranks
from fusedstep.vllm_plugin.runner.recorded_rounds import RoundStore
from fusedstep.vllm_plugin.runner.recording import (
    GraphStore,
    LoopParts,
    StepStore,
    choose,
    no_windows_reason,
)
from fusedstep.vllm_plugin.runner.rounds import Rounds
from fusedstep.vllm_plugin.runner.stats import WorkerStats
from fusedstep.vllm_plugin.runner.tables import DeviceTables, PrefillSampler
from fusedstep.vllm_plugin.runner.truncation import allocate_buffers, truncate_as_stock
from fusedstep.vllm_plugin.shared import arrival_counter
from fusedstep.window import arrivals
from fusedstep.window.graphs import variant
from fusedstep.window.loop import StepOps, run_window
from fusedstep.window.pace import AheadPace, HostPace, Pace, SetPace
from fusedstep.window.state import Fetched, WindowSlot, WindowState

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch


logger = logging.getLogger("vllm.fusedstep")

# num_sampled and num_rejected, [num_reqs].
Sampled = tuple[SamplerOutput, torch.Tensor, torch.Tensor]


class StagedWindow(NamedTuple):
    """A window between ``execute_model`` and ``sample_tokens``."""

    scheduler_output: SchedulerOutput
    slot: WindowSlot
    live: np.ndarray  # [num_reqs of the window] int64, place in the scheduled batch
    ops: StepOps
    logprobs: Logprobs | None  # that the step itself does not take down
    agreement: Agreement | None = None  # with the other data-parallel ranks


class FusedStepRunner(GPUModelRunner):  # type: ignore[misc]
    """A decode batch becomes a window: staged in ``execute_model``, run in ``sample_tokens``.

    Everything else is Model Runner V2's own step, with a reason in ``stats.stock_steps``.
    """

    ranks: Ranks | None = None  # data-parallel ones, which run the same steps

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.engine_reason = reasons.engine_reason(vllm_config)
        self.ops_choice = dispatch.resolve(device, compat.options(vllm_config).ops)
        logger.info("fusedstep: step operations %s: %s", *self.ops_choice)
        self.stats = WorkerStats(self.ops_choice.name)
        if self.ops_choice.name is None and self.engine_reason is None:
            self.engine_reason = f"{Reason.NO_OPS}: {self.ops_choice.reason}"
        self.staged: StagedWindow | None = None
        self.graph_memory: dict[str, int] = {}  # bytes of the windows' graphs
        self.scratch: Any = None  # of the step operations, where they have some
        self.grammars: Grammars | None = None  # None: this engine takes no structured output
        self.reason: str | None = None  # of the step under way
        self.rounds: Rounds | None = None  # of speculative decoding
        self.experts: RoutedExperts | None = None  # None: nobody asks for them
        if self.dp_size > 1 and self.engine_reason is None:
            self.ranks = self.stats.ranks = Ranks(self.dp_size, self.dp_rank)
        self.rotations: Counter[str] = Counter()  # layers by what became of ``--rope fused``
        self.graph_store: GraphStore
        self.no_windows: str | None = None  # why this engine's decode batches take stock steps

    @property
    def stock_steps_reason(self) -> str | None:
        """The reason that no batch of this engine gets a window, or None."""
        return self.engine_reason or self.no_windows

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if compat.options(self.vllm_config).rope == "fused":
            from fusedstep.vllm_plugin.rotation import hand_over

            self.rotations = hand_over(self.model, self.vllm_config)
        self.engine_reason = self.engine_reason or runner_reason(self)

    def warming_up_model(self) -> None:
        """Called by the CPU worker before it sizes the KV cache."""
        self.profile_run()

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """vLLM measures here what it must leave free beside the KV cache: our tables, too."""
        if self.engine_reason is None:
            self._step_class()
            self._allocate_grammars()
        super().profile_run(*args, **kwargs)

    def _step_class(self) -> Any:
        """The step operations, to be bound. Their scratch is made once: vLLM initialises its KV
        cache twice."""
        assert self.ops_choice.name is not None
        step_class: Any = dispatch.load(self.ops_choice.name)
        if self.ops_choice.name != "triton":
            return step_class
        truncation = None if self.device.type == "cpu" else truncate_as_stock
        if self.scratch is None:
            self.scratch = step_class.allocate_scratch(
                self.max_num_reqs, self.vocab_size, self.device
            )
            if truncation is not None:
                allocate_buffers(self.scratch.adjusted, self.scratch.limit_k, self.scratch.limit_p)
        return partial(step_class, scratch=self.scratch, truncation=truncation)

    def _allocate_grammars(self) -> None:
        if self.grammars is None and not self.model_config.skip_tokenizer_init:
            self.grammars = Grammars(self.max_num_reqs, self.vocab_size, self.device)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """The block tables exist from here on: build what windows need."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        reason = (
            reasons.cache_reason(kv_cache_config) or runner_reason(self) or metadata_reason(self)
        )
        self.engine_reason = self.engine_reason or reason
        if self.engine_reason is not None:
            self.ranks = None
            return
        self._allocate_grammars()
        self.tables = DeviceTables(self, None if self.grammars is None else self.grammars.state)
        step_class = self._step_class()
        self.ops = step_class(self.tables.state)
        self.masks = DeviceMasks(self.max_num_reqs, self.device, self.ops)
        self.processing = Processing(self.sampler, self.tables.state, step_class)
        self.prefill_sampler = PrefillSampler(self.tables, self.ops)
        if self.ops_choice.name == "native":
            native.warm_up(self.vocab_size, self.dtype, len(self.tables.state.block_tables))
        if not hasattr(self, "arrivals"):  # made once: a GPU's driver keeps its page
            self.arrivals = arrival_counter(self.vllm_config)
        self.windows = WindowState.allocate(self.max_num_reqs, MAX_STEPS, self.device)
        if self.aux_output_connector is not None:
            self.experts = RoutedExperts(self.aux_output_connector, self.windows.rows)
        on_cpu = self.device.type == "cpu"
        self.pace: Pace = HostPace() if on_cpu else AheadPace()
        if self.ranks is not None:
            self.pace = SetPace()
        self.copy_stream = None if on_cpu else self.output_copy_stream
        self.no_windows = no_windows_reason(self)
        loop = compat.options(self.vllm_config).loop
        if self.speculator is not None:
            use_graphs = loop != LoopForm.EAGER
            rows, inputs = self.windows.rows, self.tables.state.inputs
            self.rounds = Rounds(self, self.ops, rows, inputs, use_graphs=use_graphs)
            self.graph_store = RoundStore(self, self.rounds, self.arrivals, loop)
            self._note_form()
            return
        self._choose_form(loop)

    @torch.inference_mode()
    def capture_model(self, profile_only: bool = False) -> int:
        """vLLM's graphs, then those of the windows; bytes of device memory for both."""
        size: int = super().capture_model(profile_only=profile_only)
        if self.engine_reason is None:
            taken = self.graph_store.record(profile_only=profile_only)
            self.graph_memory["estimated" if profile_only else "taken"] = taken
            size += taken
            self.tables.static.overwritten()  # by the proof's requests
            self._note_form()
        # Nobody waits for the stream of vLLM's last piecewise capture, whose dummy batch may write
        # over the first request's inputs.
        torch.accelerator.synchronize()
        return size

    @torch.inference_mode()
    def use_form(self, loop: str) -> None:
        """Change to another form of the loop between requests, for measurements."""
        if self.engine_reason is None and self.rounds is None:
            self._choose_form(loop)
            self.graph_store.record(profile_only=False, prove=False)
            self._note_form()

    def _choose_form(self, loop: str) -> None:
        form = choose(self, loop)
        rows = self.windows.rows
        model_inputs = ModelInputs(self, self.tables, rows.idx_mapping)
        self.decode_model = VllmDecodeModel(
            self, model_inputs, rows, self.experts, use_graphs=loop != LoopForm.EAGER
        )
        parts = LoopParts(
            self.decode_model,
            self.ops,
            self.windows,
            self.tables.state,
            self.arrivals,
            self.pace,
            self.copy_stream,
        )
        self.graph_store = StepStore(self, parts, form)
        self._note_form()

    def _note_form(self) -> None:
        form, reason = self.graph_store.form
        if (form, reason) != (self.stats.loop, self.stats.loop_reason):
            logger.info("fusedstep: loop form %s: %s", form, reason)
        self.stats.loop, self.stats.loop_reason = form.value, reason
        self.arrivals.can_end_windows = form.can_be_ended and self.ranks is None

    def shutdown(self) -> None:
        """vLLM's own, and the counter's name if the engine core never came to take it away."""
        if self.engine_reason is None and hasattr(self, "arrivals"):
            self.arrivals.unlink()
        super().shutdown()

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        if self.engine_reason is None:
            news = grammars_of(scheduler_output)
            if self.grammars is not None:
                self.grammars.take(news)
            for new_request in scheduler_output.scheduled_new_reqs:
                row = self.tables.add_request(new_request)
                if self.grammars is not None:
                    self.grammars.enter(row, news.rows.get(new_request.req_id))
            if scheduler_output.scheduled_new_reqs:
                self.tables.apply_staged_writes()

    def execute_model(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> ModelRunnerOutput | Any | None:
        """Stage a window if the batch can have one, else run a stock step."""
        reason = self._stock_reason(scheduler_output, dummy=kwargs.get("dummy_run", False))
        self.reason = reason
        if reason is None:
            self._stage_window(scheduler_output)
            return None
        if reason:
            self.stats.add_stock_step(reason)
        scheduler_output = one_step_each(scheduler_output, self.num_speculative_steps)
        return super().execute_model(scheduler_output, *args, **kwargs)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """Run the staged window, or finish the stock step."""
        if self.staged is None:
            return routed_by(self.experts, super().sample_tokens(grammar_output))
        staged, self.staged = self.staged, None
        slot, is_ours = staged.slot, staged.ops is self.ops
        if self.rounds is not None:
            cut_short = self._cut_short(slot.arrivals_seen)
            graphs, record = self.graph_store.graphs, self.rounds.record
            run_window(self.rounds, self.rounds, slot, cut_short, self.pace, graphs, record)
            self.stats.counts.windows += 1
            self.rounds.finish(slot)
            tokens = partial(self.rounds.output.read, len(staged.live))
            scheduled, counts = staged.scheduler_output, self.stats.counts
            return WindowOutput(scheduled, tokens, staged.live, counts, None)
        self.kv_connector.pre_forward(staged.scheduler_output)
        if self.ranks is not None and not slot.num_reqs:
            self.ranks.join(self._dummy_step, staged.agreement)
        else:
            run_window(
                self.decode_model,
                staged.ops,
                slot,
                self._cut_short(slot.arrivals_seen),
                self.pace,
                self.graph_store.graphs if is_ours else None,
                staged.logprobs,
            )
        self.stats.counts.windows += 1
        self.kv_connector.finish_forward()
        received = self.kv_connector.post_forward(staged.scheduler_output.finished_req_ids)
        return WindowOutput(
            staged.scheduler_output,
            Fetched(slot, self.copy_stream).tokens,
            staged.live,
            self.stats.counts,
            received,
            Reason.OTHER_RANKS if staged.agreement and staged.agreement.is_cut else None,
            None if self.experts is None else self.experts.fetch(slot, self.copy_stream),
        )

    def sample(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> Sampled:
        """A stock step's sampling, by the window's own sampler wherever it can."""
        rows = input_batch.idx_mapping_np
        on_device = self.grammars is not None and self.grammars.any_of(rows)
        drafted = self.rounds is not None
        by_host = grammar_output is not None and not (drafted and on_device)
        stock = by_host or self.engine_reason is not None
        special = stock or drafted or self.tables.needs_stock[rows].any()
        ours = not (special or self.processing.is_wanted(rows))
        if stock or not (ours or on_device):
            sampled: Sampled = super().sample(hidden_states, input_batch, grammar_output)
        else:
            logits = self.model.compute_logits(hidden_states[input_batch.logits_indices])
            if ours:
                sampled = self._sample(logits, input_batch)
            else:
                output = self.masks.sample(self, logits, input_batch, grammar_output)
                sampled = output, output.num_sampled, output.num_rejected
        if on_device:
            output, num_sampled, _ = sampled
            self.masks.follow(input_batch.idx_mapping, output.sampled_token_ids, num_sampled)
        return sampled

    def _sample(self, logits: torch.Tensor, input_batch: InputBatch) -> Sampled:
        """By the window's sampler."""
        rows = input_batch.idx_mapping_np
        positions = input_batch.positions[input_batch.logits_indices]
        sampled = self.prefill_sampler(
            logits, input_batch.idx_mapping, positions, self._needs(rows)
        )
        asked = Logprobs.wanted(self.sampler, rows)
        logprobs = asked and asked.scores(logits, sampled, input_batch.idx_mapping)
        prefill_len = self.tables.prefill_len[input_batch.idx_mapping]
        finished_prefill = input_batch.seq_lens[: input_batch.num_reqs] >= prefill_len
        num_sampled = finished_prefill.to(torch.int32)
        num_rejected = torch.zeros_like(num_sampled)
        sampler_output = SamplerOutput(
            sampled_token_ids=sampled.view(-1, 1),
            logprobs_tensors=logprobs,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )
        return sampler_output, num_sampled, num_rejected

    def _stock_reason(self, scheduler_output: SchedulerOutput, dummy: bool) -> str | None:
        """The reason that this batch takes a stock step; empty when there is nothing to count."""
        if dummy or not scheduler_output.num_scheduled_tokens:
            return ""
        if self.engine_reason is not None:
            return self.engine_reason
        if scheduler_output.scheduled_new_reqs:
            return Reason.PREFILL
        req_states = self.req_states
        cached = scheduler_output.scheduled_cached_reqs
        rows = [req_states.req_id_to_index[req_id] for req_id in cached.req_ids]
        if (np.asarray(cached.num_computed_tokens) < req_states.prefill_len.np[rows]).any():
            return Reason.PREFILL
        if self.no_windows is not None:
            return self.no_windows
        if (reason := stamps.stock_step_of(scheduler_output)) is not None:
            return reason
        if self.tables.needs_stock[rows].any():
            return next(r for r in map(self.tables.reasons.get, rows) if r)
        if scheduler_output.has_structured_output_requests:
            return Reason.STRUCTURED_OUTPUT  # by the host's masks
        if self.rounds and not stamps.has_whole_rounds(scheduler_output, self.rounds.width):
            return Reason.FEWER_DRAFTS
        return batch_reason(scheduler_output)

    def _stage_window(self, scheduler_output: SchedulerOutput) -> None:
        """Model Runner V2's bookkeeping of requests and blocks, then the window's own staging."""
        self.finish_requests(scheduler_output)
        self.free_states(scheduler_output)
        self.update_requests(scheduler_output)
        self.block_tables.apply_staged_writes()

        scheduled = scheduler_output.num_scheduled_tokens
        num_reqs = len(scheduled)
        rows = np.fromiter(
            map(self.req_states.req_id_to_index.__getitem__, scheduled), np.int64, num_reqs
        )
        steps_allowed = np.fromiter(scheduled.values(), np.int32, num_reqs)
        # Requests that stopped in the window before are scheduled once more before the host
        # knows. Where the device's flags are host memory they are left out of the batch.
        live = np.flatnonzero(~self.tables.stopped_np[rows])
        rows, steps_allowed = rows[live], steps_allowed[live]
        self.tables.static.refresh()
        if self.experts is not None:
            self.experts.stage(scheduler_output, self.req_states, rows)
        if self.rounds is not None:
            self._stage_rounds(scheduler_output, rows, steps_allowed, live)
            return
        seq_lens = self.req_states.num_computed_tokens_np[rows] + 1
        processing = self.processing if self.processing.is_wanted(rows) else None
        if processing is not None:
            processing.stage(rows, seq_lens)
        logprobs = Logprobs.wanted(self.sampler, rows, processing)
        in_step = logprobs is not None and processing is None and logprobs.are_in_the_step
        self.decode_model.adapters.stage(rows)
        if self.decode_model.encoder_lengths is not None:
            self.decode_model.encoder_lengths.stage(rows)
        num_rows, num_loras = self.decode_model.stage(seq_lens, int(steps_allowed.max(initial=0)))
        slot = self.windows.next_slot()
        slot.stage(
            rows,
            steps_allowed,
            -1 if logprobs is None else logprobs.width,
            self._needs(rows, logprobs=in_step),
            num_rows,
            *stamps.stamp_of(scheduler_output),
            num_loras=num_loras,
            gives_way=self.decode_model.gives_way,
        )
        self.staged = StagedWindow(
            scheduler_output,
            slot,
            live,
            processing or self.ops,
            None if in_step else logprobs,
            self._agree(slot),
        )

    def _agree(self, slot: WindowSlot) -> Agreement | None:
        """All data-parallel ranks run as many steps as the one that wants the least."""
        if self.ranks is None:
            return None
        if not slot.num_reqs:
            return self.ranks.agree(1, JOINS)
        came = self.arrivals.exceeds(slot.arrivals_seen)  # too late for this window to give way
        agreement = self.ranks.agree(self.decode_model.num_tokens, 1 if came else slot.num_steps)
        slot.shorten(agreement.num_steps)
        self.decode_model.join_ranks(agreement.sync.num_tokens_across_dp)
        return agreement

    def _stage_rounds(
        self,
        scheduler_output: SchedulerOutput,
        rows: np.ndarray,  # [num_reqs] int64
        num_tokens: np.ndarray,  # [num_reqs] int32, reserved for each
        live: np.ndarray,  # [num_reqs] int64, place in the scheduled batch
    ) -> None:
        assert self.rounds is not None
        ids = np.array(list(scheduler_output.num_scheduled_tokens))[live].tolist()
        needs, num_rounds = self._asked(rows), num_tokens // self.rounds.width
        num_rows = self.rounds.stage(ids, rows, int(num_rounds.max(initial=0)), needs)
        slot = self.windows.next_slot()
        slot.stage(rows, num_rounds, -1, needs, num_rows, *stamps.stamp_of(scheduler_output))
        self.staged = StagedWindow(scheduler_output, slot, live, self.ops, None)

    def _needs(self, rows: np.ndarray, *, logprobs: bool = False) -> BatchNeeds:
        """Work that a batch asks of a step; compiled kernels exist of few combinations."""
        needs = replace(self._asked(rows), logprobs=logprobs)
        if self.ops_choice.name != "triton":
            return needs
        # Kernels are not compiled for logprobs; a batch has those that it asks for.
        return replace(variant(needs), logprobs=logprobs)

    def _asked(self, rows: np.ndarray) -> BatchNeeds:
        grammar = self.grammars is not None and self.grammars.any_of(rows)
        return replace(self.tables.needs(rows), grammar=grammar)

    def _dummy_step(self) -> None:
        """A forward pass for the other data-parallel ranks; nobody's token."""
        self._dummy_run(1, uniform_decode=True)

    def _cut_short(self, arrivals_seen: int) -> Callable[[], bool]:
        """Has a request arrived for which this window should end? All ranks say the same."""
        if arrivals_seen == arrivals.NEVER_END or self.ranks is not None:
            return lambda: False
        group = get_tp_group()
        if group.world_size == 1:
            return lambda: self.arrivals.exceeds(arrivals_seen)
        came = torch.zeros(1, dtype=torch.int32)

        def agreed() -> bool:
            came[0] = self.arrivals.exceeds(arrivals_seen)
            torch.distributed.broadcast(came, group.ranks[0], group=group.cpu_group)
            return bool(came)

        return agreed
