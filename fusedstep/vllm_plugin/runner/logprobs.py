"""Logprobs of a window's steps, by vLLM's own function: every mode, any number, given token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    from fusedstep.vllm_plugin.runner.processing import Processing
    from fusedstep.window.output import LogprobBuffers
    from fusedstep.window.state import WindowSlot


class Logprobs:
    """Takes down the logprobs of each step of one window, beside the sampled token's."""

    def __init__(
        self,
        sampler: Sampler,
        num_logprobs: int,
        num_token_ids: int,
        processing: Processing | None = None,  # it has the logits that are meant
    ) -> None:
        """The numbers are the most that a request asks for."""
        self.sampler, self.processing = sampler, processing
        self.num_logprobs, self.num_token_ids = num_logprobs, num_token_ids

    @staticmethod
    def wanted(
        sampler: Sampler, rows: np.ndarray, processing: Processing | None = None
    ) -> Logprobs | None:
        """As many as these requests (by req_state_idx) ask for, or None."""
        asked = sampler.get_logprobs_dims(rows) if len(rows) else None
        if asked is None:
            return None
        processed = sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        num_logprobs, num_token_ids = asked
        return Logprobs(sampler, num_logprobs, num_token_ids, processing if processed else None)

    @property
    def are_in_the_step(self) -> bool:
        """Are they those of the sampled tokens, which our step computes itself?"""
        return self.width == 0 and self.sampler.logprobs_mode == "raw_logprobs"

    @property
    def width(self) -> int:
        """Token ids of a row, without the sampled one."""
        return max(self.num_logprobs, self.num_token_ids)

    def scores(
        self,
        logits: torch.Tensor,  # [num_reqs, vocab_size]
        sampled: torch.Tensor,  # [num_reqs] int64
        idx_mapping: torch.Tensor,  # [num_reqs], batch_idx -> req_state_idx
    ) -> LogprobsTensors:
        return compute_topk_scores(
            logits,
            self.num_logprobs,
            sampled,
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=idx_mapping,
            max_per_req_token_ids=self.num_token_ids,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )

    def __call__(self, logits: torch.Tensor, slot: WindowSlot) -> None:
        """Into the window's output, in the place of its step."""
        n = slot.num_reqs
        if self.processing is not None:
            logits = self.processing.logits
        sampled = slot.rows.sampled[:n].clamp(min=0)  # -1 in a row at rest, under grammars
        scores = self.scores(logits[:n], sampled, slot.rows.idx_mapping[:n])
        take_down(scores, slot.output.logprobs, slot.steps_run)


def take_down(scores: LogprobsTensors, into: LogprobBuffers, step: int) -> None:
    """vLLM's tensors of one step into a window's output."""
    ranks = scores.selected_token_ranks
    into.take_down(step, scores.logprob_token_ids, scores.logprobs, ranks)
