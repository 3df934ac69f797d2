"""Structured output in the worker: the tables of the grammars in use, on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.structured_outputs import grammar_invalid_drafts

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
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

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
        self.on_device = _zeros((max_num_reqs,), torch.bool, device)  # the same

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
        self.on_device[row] = grammar is not None
        state, *ends = grammar or RowGrammar()
        self.state.states[row] = state
        self.state.reasoning_ends[row, 0], self.state.reasoning_ends[row, 1] = ends

    def any_of(self, rows: np.ndarray) -> bool:
        """Has one of these requests a grammar?"""
        return bool(self.has_grammar[rows].any())


class DeviceMasks:
    """Masks of stock steps and of rounds, which have several logits of a request. Its rows are its
    own."""

    def __init__(self, max_num_reqs: int, device: torch.device, ops: StockStepOps) -> None:
        self.rows = WindowRows.allocate(max_num_reqs, 1, device)
        self.ops = ops

    def sample(
        self,
        runner: GPUModelRunner,
        logits: torch.Tensor,  # [num_logits, vocab_size], changed in place
        input_batch: InputBatch,
        by_host: GrammarOutput | None,  # beside drafts: with masks of grammars the device has not
    ) -> SamplerOutput:
        """A stock step, by vLLM's samplers under the masks."""
        sample, verify = runner.sampler, runner.rejection_sampler
        output: SamplerOutput
        if runner.rounds is None:
            self.rows.idx_mapping[: len(logits)] = input_batch.idx_mapping
            self.ops.constrain(logits, self.rows, len(logits))
            output = sample(logits, input_batch)
            return output
        names: list[str] = []
        if by_host is not None:
            names = by_host.structured_output_request_ids
            runner.structured_outputs_worker.apply_grammar_bitmask(
                logits, input_batch, names, by_host.grammar_bitmask
            )
        invalid = self.constrain_drafts(logits, input_batch, runner.grammars)
        if input_batch.num_draft_tokens == 0:
            output = sample(logits, input_batch)
            return output
        if by_host is not None:
            rows = map(runner.req_states.req_id_to_index.__getitem__, names)
            known = by_host.num_acceptable_drafts or [0] * len(names)
            taken = [
                runner.rounds.num_drafts if runner.grammars.has_grammar[row] else number
                for row, number in zip(rows, known, strict=True)
            ]
            others = grammar_invalid_drafts(input_batch, names, taken)
            invalid = invalid if others is None else invalid | others
        output = verify(logits, input_batch, runner.speculator.draft_logits, invalid)
        return output

    def follow(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs]
        sampled: torch.Tensor,  # [num_reqs, n]
        num_sampled: torch.Tensor,  # [num_reqs], how many of them count
    ) -> None:
        """Move the requests on that have new tokens."""
        self.rows.idx_mapping[: len(idx_mapping)] = idx_mapping
        for offset, tokens in enumerate(sampled.unbind(1)):
            self._follow_one(torch.where(num_sampled > offset, tokens, -1))

    def constrain_drafts(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size], changed in place
        batch: InputBatch,
        grammars: Grammars,
    ) -> torch.Tensor:
        """Mask the logits behind each request's last token and behind its drafts, as if those
        before had been taken. Returns the logits [num_logits] whose draft, or one before, may not
        come: the verification takes none of those.
        """
        states, idx_mapping, num_reqs = grammars.state.states, batch.idx_mapping, batch.num_reqs
        before, has_one = states.clone(), grammars.on_device[idx_mapping]
        starts, numbers = batch.cu_num_logits[:-1], np.diff(batch.cu_num_logits_np)
        counts = batch.cu_num_logits[1:] - starts
        tokens = batch.input_ids[batch.logits_indices].to(torch.int64)
        width, is_even = int(numbers.max()), bool((numbers == numbers[0]).all())
        invalid = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        bad = invalid.new_zeros(num_reqs)
        self.rows.idx_mapping[:num_reqs] = idx_mapping
        masked = logits  # those of the last offset
        for offset in range(width):
            # A request with fewer logits: its last ones are looked at, and left alone.
            has = counts > offset
            index = starts + (counts - 1).clamp(max=offset)
            if offset:
                draft = tokens[index]
                is_masked = masked.gather(1, draft[:, None])[:, 0] == -torch.inf
                has_ended = has_one & (states[idx_mapping] == FREE)  # no draft follows its grammar
                bad |= has & (has_ended | is_masked)
                self._follow_one(torch.where(has & ~bad, draft, -1))
                invalid[index] = bad
            self.rows.idx_mapping[:num_reqs] = torch.where(has, idx_mapping, -1)
            masked = logits[offset::width] if is_even else logits[index]
            self.ops.constrain(masked, self.rows, num_reqs)
            if not is_even:
                logits[index] = masked
        states.copy_(before)
        return invalid

    def _follow_one(self, tokens: torch.Tensor) -> None:
        """A token of each row; -1: none."""
        self.rows.sampled[: len(tokens)] = tokens
        self.ops.follow(self.rows, len(tokens))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU they take memory only where they are written."""
    if device.type == "cpu":
        return untouched_zeros(torch.empty(shape, dtype=dtype, device="meta"))
    return torch.zeros(shape, dtype=dtype, device=device)
