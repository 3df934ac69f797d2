"""Logits that our kernels do not know how to process: vLLM's own sampler does it, step by step.

Thinking budgets, custom logits processors, and logprobs of processed logits. Its functions see what
they see in a stock step, so the tokens are stock's; our step then draws from what they leave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES

from fusedstep.ops.types import BatchNeeds, SamplingState, StepState, WindowRows
from fusedstep.vllm_plugin.runner.parts import LOGITS_PROCESSORS
from fusedstep.window.loop import StepOps

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.sampler import Sampler


class MaskingOps(StepOps, Protocol):
    """Step operations that can mask before somebody else changes the logits."""

    def constrain(self, logits: torch.Tensor, rows: WindowRows, num_reqs: int) -> None:
        """Mask what grammars forbid, as ``step`` does first."""


class Processing:
    """``StepOps`` for the windows of such a batch. The steps are eager."""

    def __init__(
        self,
        sampler: Sampler,
        state: StepState,
        bind: Callable[[StepState], MaskingOps],  # our step operations
    ) -> None:
        self.sampler, self.inputs = sampler, state.inputs
        self.custom = sampler.logits_processors[len(LOGITS_PROCESSORS) :]
        requests, self.sampling = state.requests, state.sampling
        max_num_reqs, vocab_size = requests.output_bin_counts.shape
        device = requests.output_bin_counts.device
        # What is left to us is the draw: greedy, or at temperature 1 of what is scaled already.
        drawing = SamplingState.off(max_num_reqs, vocab_size, device, width=1)
        self.temperature = drawing.temperature
        self.ops = bind(replace(state, sampling=replace(drawing, seeds=self.sampling.seeds)))
        self.rows = np.zeros(0, dtype=np.int64)
        self.idx_mapping = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.first_of_its_request = torch.zeros_like(self.idx_mapping)  # one logits row each
        self.seq_lens = np.zeros(0, dtype=np.int32)

    def is_wanted(self, rows: np.ndarray) -> bool:
        """Does one of these requests (by req_state_idx) ask for what our kernels do not do?"""
        sampler, thinking = self.sampler, self.sampler.thinking_budget_state
        if self.custom or (thinking.enabled and thinking.use_thinking_budget[rows].any()):
            return True
        if sampler.logprobs_mode not in PROCESSED_LOGPROBS_MODES or not len(rows):
            return False
        return sampler.get_logprobs_dims(rows) is not None

    def stage(
        self,
        rows: np.ndarray,  # [num_reqs] int64, batch_idx -> req_state_idx
        seq_lens: np.ndarray,  # [num_reqs] int32, upper bound in the first step
    ) -> None:
        """The coming window's requests."""
        self.rows, self.seq_lens = rows, seq_lens.copy()
        torch.ne(self.sampling.temperature, 0, out=self.temperature)

    def prepare(self, rows: WindowRows, num_reqs: int) -> None:
        self.ops.prepare(rows, num_reqs)
        self.idx_mapping[:num_reqs] = rows.idx_mapping[:num_reqs]

    def step(
        self, logits: torch.Tensor, rows: WindowRows, num_reqs: int, needs: BatchNeeds
    ) -> None:
        """``needs`` concern our own processing: grammars alone are left."""
        if needs.grammar:
            self.ops.constrain(logits, rows, num_reqs)
        self.logits = self._processed(logits)
        left = replace(BatchNeeds.none(), grammar=needs.grammar)
        self.ops.step(self.logits, rows, num_reqs, left)

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [num_rows, vocab_size] that stock would draw from."""
        n, inputs = len(self.rows), self.inputs
        for processor in self.custom:
            processor.apply_staged_writes()  # once per step, says their contract
        processed: torch.Tensor = self.sampler.apply_sampling_params(
            logits[:n],
            self.idx_mapping[:n],
            self.idx_mapping[:n],
            self.rows,
            inputs.positions[:n],
            inputs.input_ids[:n],
            self.first_of_its_request[:n],
            self.seq_lens,
        )
        self.seq_lens += 1
        if len(logits) == n:
            return processed
        # Rows of padding are not drawn from.
        return torch.cat([processed, logits[n:].to(processed.dtype)])
