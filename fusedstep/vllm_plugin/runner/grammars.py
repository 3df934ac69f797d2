"""Structured output in the worker: the tables of the grammars in use, on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from fusedstep.ops.types import FREE, GrammarState, WindowRows
from fusedstep.vllm_plugin.grammar_tables import (
    BYTES_PER_TOKEN,
    MAX_STATES,
    GrammarNews,
    RowGrammar,
    mask_words,
    max_masks,
)
from fusedstep.vllm_plugin.runner.tables import untouched_zeros

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.output import SamplerOutput
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    from fusedstep.vllm_plugin.runner.tables import StockStepOps


class Grammars:
    """Rows are req_state_idx. The scheduler says what lies where (``scheduler/grammars.py``)."""

    def __init__(self, max_num_reqs: int, vocab_size: int, device: torch.device) -> None:
        def int32(*shape: int) -> torch.Tensor:
            return _zeros(shape, torch.int32, device)

        self.state = GrammarState(
            states=torch.full((max_num_reqs,), FREE, dtype=torch.int32, device=device),
            reasoning_ends=int32(max_num_reqs, 2),
            next_states=int32(MAX_STATES, 256),
            mask_ids=int32(MAX_STATES),
            masks=int32(max_masks(vocab_size), mask_words(vocab_size)),
            token_starts=int32(vocab_size + 1),
            token_bytes=_zeros((BYTES_PER_TOKEN * vocab_size,), torch.uint8, device),
        )
        self.has_grammar = np.zeros(max_num_reqs, dtype=bool)

    def take(self, news: GrammarNews) -> None:
        """New tables, in the order of the device's work: no request uses what they overwrite."""
        state = self.state
        if news.vocabulary is not None:
            starts, data = news.vocabulary
            async_tensor_h2d(starts, out=state.token_starts[: len(starts)])
            async_tensor_h2d(data, out=state.token_bytes[: len(data)])
        for table in news.tables:
            states = slice(table.first_state, table.first_state + len(table.mask_ids))
            masks = slice(table.first_mask, table.first_mask + len(table.masks))
            async_tensor_h2d(table.next_states, out=state.next_states[states])
            async_tensor_h2d(table.mask_ids, out=state.mask_ids[states])
            async_tensor_h2d(table.masks, out=state.masks[masks])

    def enter(self, row: int, grammar: RowGrammar | None) -> None:
        """A request enters its row."""
        self.has_grammar[row] = grammar is not None
        state, *ends = grammar or RowGrammar()
        self.state.states[row] = state
        self.state.reasoning_ends[row, 0], self.state.reasoning_ends[row, 1] = ends

    def any_of(self, rows: np.ndarray) -> bool:
        """Has one of these requests a grammar?"""
        return bool(self.has_grammar[rows].any())


class StockSteps:
    """The device's part in a stock step of requests with grammars; its rows are its own."""

    def __init__(self, max_num_reqs: int, device: torch.device, ops: StockStepOps) -> None:
        self.rows = WindowRows.allocate(max_num_reqs, 1, device)
        self.ops = ops

    def sample(
        self, sampler: Sampler, logits: torch.Tensor, input_batch: InputBatch
    ) -> SamplerOutput:
        """By vLLM's sampler, under the masks. ``logits`` [num_reqs, vocab_size] are changed."""
        num_reqs = len(logits)
        self.rows.idx_mapping[:num_reqs] = input_batch.idx_mapping
        self.ops.constrain(logits, self.rows, num_reqs)
        return sampler(logits, input_batch)

    def follow(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs]
        sampled: torch.Tensor,  # [num_reqs]
        num_sampled: torch.Tensor,  # [num_reqs], 0: the token does not count
    ) -> None:
        """Move the requests on that have a new token."""
        num_reqs = len(idx_mapping)
        self.rows.idx_mapping[:num_reqs] = idx_mapping
        self.rows.sampled[:num_reqs] = torch.where(num_sampled > 0, sampled, -1)
        self.ops.follow(self.rows, num_reqs)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU they take memory only where they are written."""
    if device.type == "cpu":
        return untouched_zeros(torch.empty(shape, dtype=dtype, device="meta"))
    return torch.zeros(shape, dtype=dtype, device=device)
