"""Chooses the form of the loop on this engine and records the graphs that it needs."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import (
    get_tp_group,
    graph_capture,
    is_global_first_rank,
)

from fusedstep.loop_forms import BEST, LoopForm
from fusedstep.ops.types import StepState
from fusedstep.reasons import Reason
from fusedstep.vllm_plugin import reasons
from fusedstep.vllm_plugin.runner.decode_model import (
    VllmDecodeModel,
    attention_groups,
    decode_graph,
    in_place,
    padded_rows,
)
from fusedstep.window.arrivals import ArrivalCounter
from fusedstep.window.graphs import GRAMMAR, VARIANTS, WindowGraphs
from fusedstep.window.loop import StepOps
from fusedstep.window.pace import Pace
from fusedstep.window.proof import Proof
from fusedstep.window.recorder import CudaRecorder, missing
from fusedstep.window.state import WindowState

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from fusedstep.vllm_plugin.runner.drafter import DraftModel

logger = logging.getLogger("vllm.fusedstep")

# While vLLM sizes its memory, the graphs of the largest batches stand for all.
PROFILED_SIZES = 2


class Form(NamedTuple):
    """``reason``: why it is not a better one, or what chose it."""

    name: LoopForm
    reason: str


@dataclass(frozen=True)
class LoopParts:
    """The parts of the loop that graphs are recorded from, and proved with."""

    model: VllmDecodeModel
    ops: StepOps
    windows: WindowState
    state: StepState
    arrivals: ArrivalCounter
    pace: Pace
    copy_stream: torch.cuda.Stream | None  # of the results; None on a CPU


def choose(runner: GPUModelRunner, loop: str) -> Form:
    """The best form at or below ``loop`` (one of ``options.LOOPS``) that can be tried here."""
    if runner.device.type == "cpu":
        return Form(LoopForm.EAGER, "the device is a cpu")
    wanted = BEST if loop == "auto" else LoopForm(loop)
    reasons = []
    while (reason := _obstacle(runner, wanted)) is not None:
        reasons.append(f"{wanted}: {reason}")
        wanted = wanted.fallback
    return Form(wanted, "; ".join(reasons) or "works here")


def _obstacle(runner: GPUModelRunner, form: LoopForm) -> str | None:
    """The reason that ``form`` cannot even be tried, or None."""
    if not form.is_recorded:
        return None
    mode = runner.compilation_config.cudagraph_mode
    if mode is None or mode.decode_mode() != CUDAGraphMode.FULL:
        return "no full CUDA graphs for decode"
    if form is LoopForm.REPLAY:
        return None
    planners = _planners(runner)
    if planners:
        return f"{', '.join(sorted(planners))} plans every step on the host"
    if form is LoopForm.WHILE and runner.parallel_config.tensor_parallel_size > 1:
        return "tensor parallelism communicates, which a WHILE node does not allow"
    return missing(form)


def _planners(runner: GPUModelRunner) -> set[str]:
    """Backends whose metadata the host moves along before every step."""
    return {g.backend.get_name() for g in attention_groups(runner) if not in_place(g)}


def no_windows_reason(runner: GPUModelRunner) -> str | None:
    """The reason that decode batches take stock steps, although the step operations run here."""
    if runner.device.type == "cpu":
        return None
    planners = _planners(runner)
    if runner.speculator is not None:  # each round plans again, and so does its drafter
        drafters = getattr(runner.speculator, "attn_groups", [])
        groups = [g for each in (*runner.attn_groups, *drafters) for g in each]
        planners = {g.backend.get_name() for g in groups}
    if planners & reasons.PLAN_FROM_BOUND:
        return f"{Reason.HOST_PLAN} {', '.join(sorted(planners))}"
    return None


class GraphStore(ABC):
    """The graphs of an engine's windows, recorded when vLLM records its own."""

    def __init__(self, runner: GPUModelRunner, arrivals: ArrivalCounter, form: Form) -> None:
        self.runner, self.arrivals, self.form = runner, arrivals, form
        self.graphs: WindowGraphs | None = None

    @abstractmethod
    def _made_up(self) -> AbstractContextManager[None]:
        """Nobody's requests may be in the batches that are recorded."""

    @abstractmethod
    def _batches(self) -> list[tuple[int, int]]:
        """Padded rows and LoRA adapters of the batches for which vLLM has a graph, the largest
        first."""

    @abstractmethod
    def _new_graphs(self) -> WindowGraphs | None:
        """Graphs of this form, none recorded yet; None where none of ours is wanted."""

    @abstractmethod
    def prove(self) -> None:
        """Raises WrongTokensError. Overwrites KV blocks."""

    def record(self, *, profile_only: bool, prove: bool = True) -> int:
        """Record the steps of all batch sizes; a form that fails makes way for the next.

        With ``prove``, so does one whose tokens are not those of the eager loop: while no KV block
        is in use, nor kept for its prefix.

        Returns the bytes of device memory that they take; an estimate while vLLM sizes its memory,
        where they are thrown away again.
        """
        taken = 0
        while self.form.name.is_recorded:
            free, began = _free_bytes(), time.perf_counter()
            failure: Exception | None = None
            try:
                with self._made_up():
                    self.graphs, taken = self._record(PROFILED_SIZES if profile_only else None)
                    if prove and not profile_only:
                        self.prove()
            except Exception as error:
                failure = error
            if not _all_ranks(failure is None):
                self._make_way(failure or RuntimeError("another rank could not"))
                continue
            if not profile_only:
                logger.info(
                    "fusedstep: recorded the decode windows (%s) in %.0f s, %.2f GiB",
                    self.form.name,
                    time.perf_counter() - began,
                    (free - _free_bytes()) / (1 << 30),
                )
            break
        if profile_only:
            self.graphs = None
        return taken

    def _make_way(self, error: Exception) -> None:
        """The next form comes instead of this one."""
        self.graphs = None
        lines = str(error).splitlines() or [type(error).__name__]
        reason = f"{self.form.name}: {lines[0]}"
        self.form = Form(self.form.name.fallback, reason)
        logger.warning("fusedstep: loop form %s instead of %s", self.form.name, reason)

    def _record(self, num_sizes: int | None) -> tuple[WindowGraphs | None, int]:
        """The graphs of the largest ``num_sizes`` batches, and the bytes that all would take."""
        batches, graphs = self._batches(), self._new_graphs()
        if graphs is None:
            return None, 0
        recorded = batches[:num_sizes]
        taken: list[int] = []
        with graph_capture(device=self.runner.device):
            recorder = CudaRecorder(self.runner.device, self.arrivals)
            for num_rows, num_loras in self._shown(recorded):
                free = _free_bytes()
                graphs.record(recorder, num_rows, num_loras)
                taken.append(free - _free_bytes())
        rest = len(batches) - len(recorded)
        return graphs, sum(taken) + rest * (taken[-1] if taken else 0)

    def _shown(self, batches: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """With vLLM's kind of progress bar, on the first rank."""
        if is_global_first_rank():
            yield from tqdm(batches, desc=f"Recording decode windows ({self.form.name})")
        else:
            yield from batches


class StepStore(GraphStore):
    """The graphs of decode steps."""

    def __init__(self, runner: GPUModelRunner, parts: LoopParts, form: Form) -> None:
        super().__init__(runner, parts.arrivals, form)
        self.parts = parts

    def _made_up(self) -> AbstractContextManager[None]:
        return self.parts.model.adapters.made_up()

    def _new_graphs(self) -> WindowGraphs | None:
        if _planners(self.runner):
            return None  # planned before every step: vLLM's own graph is the forward then
        parts = self.parts
        variants = VARIANTS if parts.state.grammar is None else (*VARIANTS, GRAMMAR)
        return WindowGraphs(self.form.name, parts.model, parts.ops, parts.windows, variants)

    def prove(self) -> None:
        """The smallest and the largest batch: other kernels may run in them.

        Raises WrongTokensError. Overwrites KV blocks.
        """
        parts, graphs = self.parts, self.graphs
        if graphs is None:
            return
        batches = self._batches()
        for num_rows, num_loras in {batches[-1], batches[0]}:
            proof = Proof(
                parts.state,
                graphs,
                self.runner.kv_cache_config.num_blocks - 1,  # block 0 is vLLM's null block
                partial(self._stage_made_up, num_loras),
                parts.copy_stream,
                parts.pace,
                parts.model.forget_states,
            )
            proof.check(num_rows)

    def _stage_made_up(
        self, num_loras: int, seq_lens: np.ndarray, num_steps: int
    ) -> tuple[int, int]:
        self.parts.model.adapters.make_up(num_loras, len(seq_lens))
        return self.parts.model.stage(seq_lens, num_steps)

    def _batches(self) -> list[tuple[int, int]]:
        """vLLM's full graphs end below a ``max_num_seqs`` that is none of their sizes."""
        batches = set()
        for num_loras in self.parts.model.adapters.graph_cases:
            for num_reqs in range(1, self.runner.max_num_reqs + 1):
                graph = decode_graph(self.runner, num_reqs, num_loras)
                if graph.cg_mode != CUDAGraphMode.NONE:
                    batches.add((padded_rows(graph, self.runner.max_num_reqs), num_loras))
        return sorted(batches, reverse=True)


def record_drafts(
    runner: GPUModelRunner,
    drafter: DraftModel,
    sizes: list[int],
    arrivals: ArrivalCounter,
    *,
    profile_only: bool,
) -> int:
    """Record the drafts of rounds of so many rows; if that fails the host launches them.

    Returns the bytes of device memory, as ``GraphStore.record``.
    """
    taken, failure = 0, None
    if sizes:
        try:
            with graph_capture(device=runner.device):
                recorder, free = CudaRecorder(runner.device, arrivals), _free_bytes()
                drafter.record(recorder, sizes)
                taken = free - _free_bytes()
        except Exception as error:
            failure = error
        fine = _all_ranks(failure is None)
        if not fine:
            reason = failure or "another rank could not record it"
            logger.warning("fusedstep: the host launches the draft model: %s", reason)
        if profile_only or not fine:
            drafter.forget_records()
    return taken


def _all_ranks(fine: bool) -> bool:
    """Is it fine on every rank of this tensor-parallel group? They must run the same form."""
    group = get_tp_group()
    if group.world_size == 1:
        return fine
    answer = torch.tensor([int(fine)], dtype=torch.int32, device="cpu")
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(answer.item())


def _free_bytes() -> int:
    return int(torch.accelerator.get_memory_info()[0])
