"""Model Runner V2's request state as the step operations see it: static tensors, no copies."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from vllm.v1.kv_cache_interface import SlidingWindowSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.sample.bad_words import apply_bad_words
from vllm.v1.worker.gpu.sample.logit_bias import apply_logit_bias
from vllm.v1.worker.gpu.sample.penalties import apply_penalties

from fusedstep.ops.types import (
    BatchNeeds,
    GrammarState,
    RequestState,
    SamplingState,
    StepInputs,
    StepState,
    StopState,
    WindowRows,
)
from fusedstep.vllm_plugin import reasons

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner


class StaticTensors:
    """Fixed addresses for what the host writes.

    The device's view of a UVA tensor moves with every copy, and a window outlives it. On the CPU
    the host's side is device memory and never moves; elsewhere ``refresh`` updates copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_host = device.type == "cpu"
        self._copies: list[tuple[torch.Tensor, UvaBackedTensor]] = []
        self._seen: list[torch.Tensor | None] = []  # the view that each copy was made from

    def of(self, tensor: UvaBackedTensor) -> torch.Tensor:
        if self._on_host:
            host: torch.Tensor = tensor.cpu
            return host
        copy: torch.Tensor = tensor.gpu.clone()
        self._copies.append((copy, tensor))
        self._seen.append(tensor.gpu)
        return copy

    def refresh(self) -> None:
        """Copy what the host has changed, in the order of the device's work.

        Before every use: by a window, and by a stock step that samples with our kernels. A UVA
        tensor has a new view whenever it was copied to. One launch for each dtype.
        """
        by_dtype: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for i, (copy, tensor) in enumerate(self._copies):
            if tensor.gpu is not self._seen[i]:
                self._seen[i] = tensor.gpu
                copies, views = by_dtype.setdefault(copy.dtype, ([], []))
                copies.append(copy)
                views.append(tensor.gpu)
        for copies, views in by_dtype.values():
            torch._foreach_copy_(copies, views)

    def overwritten(self) -> None:
        """Something else was written to the copies: the next ``refresh`` copies all."""
        self._seen = [None] * len(self._copies)


def sliding_reach(group: KVCacheGroupSpec) -> int:
    """Tokens before a row's next one that must stay readable; 0: all, there is no sliding window.

    vLLM 0.33's ``SlidingWindowSpec.num_retained_tokens``, for whose blocks it gathers the null
    block in every stock step. 0.32 leaves there what may be somebody else's by now.
    """
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        layers: UniformTypeKVCacheSpecs = spec
        spec = layers.first_spec
    if not isinstance(spec, SlidingWindowSpec):
        return 0
    window: SlidingWindowSpec = spec
    return int(window.sliding_window - 1 + window.extra_retained_tokens)


def untouched_zeros(like: torch.Tensor) -> torch.Tensor:
    """Zeros of the same shape that take memory only where they are written.

    max_num_reqs x vocab_size counts are 50 MiB for a small model; torch's allocator touches all.
    """
    memory = mmap.mmap(-1, like.numel() * like.element_size())
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def release_free_memory() -> None:
    """Give back what loading the model has freed: the allocators would keep it."""
    process = ctypes.CDLL(None)
    if hasattr(process, "MallocExtension_ReleaseFreeMemory"):
        process.MallocExtension_ReleaseFreeMemory()
    elif hasattr(process, "malloc_trim"):
        process.malloc_trim(0)


class DeviceTables:
    """Built once from the runner; rows are req_state_idx.

    Beside the views of Model Runner V2's own state it keeps what that has not: the stop rule,
    the stopped flags, and which requests need stock steps.
    """

    def __init__(self, runner: GPUModelRunner, grammar: GrammarState | None = None) -> None:
        self.req_states = state = runner.req_states
        self.sampler = sampler = runner.sampler
        self.max_model_len = runner.max_model_len
        self.has_drafts = runner.speculator is not None
        device, max_num_reqs = runner.device, runner.max_num_reqs
        self.static = static = StaticTensors(device)
        bias, penalties, bad_words = sampler.logits_processors[:3]
        if device.type == "cpu":
            penalties.output_bin_counts = untouched_zeros(penalties.output_bin_counts)
            release_free_memory()

        self.requests = RequestState(
            last_sampled_tokens=state.last_sampled_tokens,
            num_computed_tokens=state.num_computed_tokens.gpu,
            total_len=state.total_len.gpu,
            prompt_len=static.of(state.prompt_len),
            all_token_ids=state.all_token_ids.gpu,
            prompt_bin_mask=penalties.prompt_bin_mask,
            output_bin_counts=penalties.output_bin_counts,
            stopped=torch.zeros(max_num_reqs, dtype=torch.bool, device=device),
        )
        sampling = SamplingState(
            temperature=static.of(sampler.sampling_states.temperature),
            seeds=static.of(sampler.sampling_states.seeds),
            top_k=static.of(sampler.sampling_states.top_k),
            top_p=static.of(sampler.sampling_states.top_p),
            min_p=static.of(sampler.sampling_states.min_p),
            repetition_penalty=static.of(penalties.repetition_penalty),
            frequency_penalty=static.of(penalties.frequency_penalty),
            presence_penalty=static.of(penalties.presence_penalty),
            num_allowed_token_ids=static.of(bias.num_allowed_token_ids),
            allowed_token_ids=bias.allowed_token_ids.gpu,
            num_logit_bias=static.of(bias.num_logit_bias),
            logit_bias_token_ids=bias.logit_bias_token_ids.gpu,
            logit_bias=bias.logit_bias.gpu,
            min_lens=static.of(bias.min_lens),
            num_min_stop_token_ids=static.of(bias.num_stop_token_ids),
            min_stop_token_ids=bias.stop_token_ids.gpu,
            num_bad_words=static.of(bad_words.num_bad_words),
            bad_word_token_ids=bad_words.bad_word_token_ids.gpu,
            bad_word_offsets=bad_words.bad_word_offsets.gpu,
        )
        self.max_len = UvaBackedTensor(max_num_reqs, dtype=torch.int32)
        self.num_stop_token_ids = UvaBackedTensor(max_num_reqs, dtype=torch.int32)
        self.stop_token_ids = UvaBackedTensor(
            (max_num_reqs, reasons.MAX_STOP_TOKEN_IDS + 1), dtype=torch.int32
        )
        stop = StopState(
            max_len=static.of(self.max_len),
            num_stop_token_ids=static.of(self.num_stop_token_ids),
            stop_token_ids=static.of(self.stop_token_ids),
        )
        tables = runner.block_tables
        inputs = StepInputs(
            input_ids=runner.input_buffers.input_ids,
            positions=runner.input_buffers.positions,
            seq_lens=runner.input_buffers.seq_lens,
            slot_mappings=tables.slot_mappings,
            input_block_tables=tuple(tables.input_block_tables),
            block_sizes=tuple(tables.block_sizes),
            sliding_reach=tuple(map(sliding_reach, runner.kv_cache_config.kv_cache_groups)),
        )
        self.state = StepState(
            self.requests,
            sampling,
            stop,
            inputs,
            block_tables=tuple(table.gpu for table in tables.block_tables),
            num_blocks=static.of(tables.num_blocks),
            grammar=grammar,
        )
        self.never_restored = torch.zeros_like(sampling.num_min_stop_token_ids)
        self.prefill_len = static.of(state.prefill_len)
        rope = getattr(runner.model_state, "rope_state", None)  # encoder-decoder models lack it
        self.prefill_delta = None if rope is None else static.of(rope.prefill_delta)

        # Where device memory is host memory the host sees at once which requests have stopped.
        self.stopped_np = (
            self.requests.stopped.numpy()
            if device.type == "cpu"
            else np.zeros(max_num_reqs, dtype=bool)
        )
        self.needs_stock = np.zeros(max_num_reqs, dtype=bool)
        self.reasons: dict[int, str] = {}  # req_state_idx -> why its batch takes stock steps

    def add_request(self, new_request: NewRequestData) -> int:
        """A request enters its row: its stop rule, and whether the device can decode it.

        Returns the row.
        """
        row: int = self.req_states.req_id_to_index[new_request.req_id]
        params = new_request.sampling_params
        reason = reasons.request_reason(params, drafts=self.has_drafts)
        self.needs_stock[row] = reason is not None
        self.reasons.pop(row, None)
        self.requests.stopped[row] = False
        if reason is not None:
            self.reasons[row] = reason
            return row
        stop_ids = list(params.stop_token_ids or ())
        if params.eos_token_id is not None:
            stop_ids.append(params.eos_token_id)
        self.max_len.np[row] = min(new_request.prompt_len + params.max_tokens, self.max_model_len)
        self.num_stop_token_ids.np[row] = len(stop_ids)
        self.stop_token_ids.np[row, : len(stop_ids)] = stop_ids
        return row

    def apply_staged_writes(self) -> None:
        """After requests were added: their stop rules to the device, and all that changed.

        The stock step that follows samples from the copies.
        """
        for tensor in (self.max_len, self.num_stop_token_ids, self.stop_token_ids):
            tensor.copy_to_uva()
        self.static.refresh()

    def limits(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The top-k and top-p of these requests, [num_rows] each."""
        sampling = self.state.sampling
        return sampling.top_k[rows], sampling.top_p[rows]

    def adjust(
        self,
        logits: torch.Tensor,  # [num_logits, V] float32
        of_tokens: torch.Tensor,  # req_state_idx; [num_logits], as all that follow
        drafts: torch.Tensor,  # the input tokens
        positions: torch.Tensor,
        local_pos: torch.Tensor,  # within the row
    ) -> None:
        """In place: bias, penalties and bad words of a round, by vLLM's own functions."""
        requests, sampling = self.requests, self.state.sampling
        apply_logit_bias(
            logits,
            of_tokens,
            positions,
            sampling.num_allowed_token_ids,
            sampling.allowed_token_ids,
            sampling.num_logit_bias,
            sampling.logit_bias_token_ids,
            sampling.logit_bias,
            sampling.min_lens,
            sampling.num_min_stop_token_ids,
            self.never_restored,  # only under structured output
            sampling.min_stop_token_ids,
        )
        apply_penalties(
            logits,
            of_tokens,
            drafts,
            local_pos,
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
            requests.prompt_bin_mask,
            requests.output_bin_counts,
        )
        apply_bad_words(
            logits,
            of_tokens,
            sampling.bad_word_token_ids,
            sampling.bad_word_offsets,
            sampling.num_bad_words,
            requests.all_token_ids,
            requests.prompt_len,
            requests.total_len,
            drafts,
            local_pos,
            sampling.bad_word_offsets.shape[1] - 1,
        )

    def needs(self, rows: np.ndarray) -> BatchNeeds:
        """Work that these requests ask of a step."""
        bias, penalties, bad_words = self.sampler.logits_processors[:3]
        states = self.sampler.sampling_states
        sampled = rows[states.temperature.np[rows] != 0]
        adjusted = (
            bias.use_logit_bias[rows]
            | penalties.use_penalty[rows]
            | (bad_words.num_bad_words.np[rows] > 0)
        )
        truncated = (states.top_k.np[sampled] < states.vocab_size) | (states.top_p.np[sampled] < 1)
        return BatchNeeds(
            adjustment=bool(adjusted.any()),
            min_p=bool((states.min_p.np[sampled] != 0).any()),
            truncation=bool(truncated.any()),
        )


class StockStepOps(Protocol):
    """The part of the step operations that a stock step can use."""

    def sample(
        self, logits: torch.Tensor, rows: WindowRows, num_reqs: int, needs: BatchNeeds
    ) -> None:
        """The tokens alone."""

    def constrain(self, logits: torch.Tensor, rows: WindowRows, num_reqs: int) -> None:
        """Mask what grammars forbid."""

    def follow(self, rows: WindowRows, num_reqs: int) -> None:
        """Move requests on in their grammars, by ``rows.sampled``."""


class PrefillSampler:
    """The window's sampler for a stock step, whose rows are those that it samples for."""

    def __init__(self, tables: DeviceTables, ops: StockStepOps) -> None:
        max_num_reqs = len(tables.needs_stock)
        self.rows = WindowRows.allocate(max_num_reqs, 1, tables.prefill_len.device)
        self.rows.active.fill_(True)
        self.positions = tables.state.inputs.positions
        self.ops = ops

    def __call__(
        self,
        logits: torch.Tensor,  # [num_reqs, vocab_size]
        idx_mapping: torch.Tensor,  # [num_reqs], batch_idx -> req_state_idx
        positions: torch.Tensor,  # [num_reqs], of the input token that each row's logits follow
        needs: BatchNeeds,
    ) -> torch.Tensor:
        """Sampled token ids [num_reqs] int64. The step's own positions are overwritten."""
        num_reqs = len(logits)
        self.rows.idx_mapping[:num_reqs] = idx_mapping
        self.positions[:num_reqs] = positions
        self.ops.sample(logits, self.rows, num_reqs, needs)
        return self.rows.sampled[:num_reqs].clone()
