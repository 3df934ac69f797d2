"""Stock vLLM's work between lm_head and the next forward, without an engine: what ours is timed by.

``StockStep`` is Model Runner V2's sequence of a plain decode step, out of its own classes and in
its own order (``v1/worker/gpu/model_runner.py``). ``StockSampler`` is what vLLM has on the CPU.
Both start from the tensors that our step is bound to, so that all see the same requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams

if current_platform.is_cpu():
    # First of all, as in ``worker.py``: it puts plain tensors in the place of UVA buffers.
    import vllm.v1.worker.cpu.shm  # noqa: F401
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors, MinPLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler as SamplerV1
from vllm.v1.worker.gpu import states
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import (
    InputBatch,
    InputBuffers,
    combine_sampled_and_draft_tokens,
    post_update,
    prepare_pos_seq_lens,
)
from vllm.v1.worker.gpu.sample.sampler import Sampler

from fusedstep.errors import UnsupportedError
from fusedstep.ops.reference import apply_top_k, apply_top_p, gumbel_noise
from fusedstep.ops.types import RequestState, SamplingState, StepInputs


class Sampled(NamedTuple):
    """Results of one step, by row."""

    tokens: torch.Tensor  # [num_reqs] int64
    logprobs: torch.Tensor | None  # [num_reqs] float32, when asked
    ranks: torch.Tensor | None  # [num_reqs] int64, when asked


def check_platform(device: torch.device) -> None:
    """Raise UnsupportedError unless the installed vLLM is one for ``device``."""
    found = current_platform.device_type
    if found != device.type:
        raise UnsupportedError(
            f"this vLLM is a build for {found}, not for {device.type}: use --device {found}"
        )


def is_tie(
    logits: torch.Tensor,  # [V] of one row
    row: int,
    position: int,  # of the row's input token
    sampling: SamplingState,
    tokens: tuple[int, ...],
) -> bool:
    """Can the same noise give each of ``tokens``, of a row with top-k or top-p and no penalties?

    vLLM does not define which of several equal logits stay where the cumulative probability
    reaches p: its sorts are not stable. So each of them may be in or out.
    """
    if sampling.temperature[row] == 0:
        return False
    scores = (logits.float() / sampling.temperature[row]).cpu()
    kept = apply_top_k(scores, int(sampling.top_k[row]))
    kept = apply_top_p(kept, sampling.top_p[row].cpu())
    cut = kept[kept > -torch.inf].min()
    token_ids = torch.arange(len(scores))
    noisy = scores + gumbel_noise(int(sampling.seeds[row]), position, token_ids)
    best = noisy.masked_fill(scores <= cut, -torch.inf).max()
    return all(
        bool(noisy[token] == best or (scores[token] == cut and noisy[token] > best))
        for token in tokens
    )


@cache
def _config() -> VllmConfig:
    """vLLM's defaults; samplers read little of it."""
    return VllmConfig()


def _sampled(output: Any) -> Sampled:
    """Of a SamplerOutput of either runner."""
    tokens, scores = output.sampled_token_ids[:, 0].long(), output.logprobs_tensors
    if scores is None:
        return Sampled(tokens, None, None)
    return Sampled(tokens, scores.logprobs[:, 0], scores.selected_token_ranks)


class StockStep:
    """Model Runner V2's decode step of rows 0 to num_reqs - 1, all on the device.

    Left out is what the host does in each step: building the batch, copying ``idx_mapping`` and
    ``query_start_loc`` to the device and the tokens back. Request parameters and token ids lie in
    host memory that the device reads (UVA), as in the runner.
    """

    def __init__(
        self,
        requests: RequestState,  # copied, R = num_reqs
        sampling: SamplingState,  # its seeds are copied, the rest follows from ``params``
        inputs: StepInputs,  # its sizes
        block_tables: tuple[torch.Tensor, ...],  # per group [R, max_num_blocks] int32
        num_blocks: torch.Tensor,  # [num_kv_cache_groups, R] int32
        params: Mapping[str, Any],  # SamplingParams of every row, without the seed
        *,
        seeded: bool = True,  # without seeds vLLM may choose a sampler with noise of its own
    ) -> None:
        device = requests.total_len.device
        num_reqs, max_model_len = requests.all_token_ids.shape
        vocab_size = requests.output_bin_counts.shape[1]
        max_num_tokens = len(inputs.input_ids)
        self.requests = states.RequestState(
            num_reqs, max_model_len, max_num_tokens, 0, vocab_size, device
        )
        self.requests.free_indices.reverse()  # request i gets row i
        self.sampler = Sampler(_config(), num_reqs, vocab_size, device, self.requests)
        self.block_tables = BlockTables(
            block_sizes=list(inputs.block_sizes),
            max_num_reqs=num_reqs,
            max_num_batched_tokens=max_num_tokens,
            max_num_blocks_per_group=[table.shape[1] for table in block_tables],
            device=device,
        )
        buffers = InputBuffers(num_reqs, max_num_tokens, device)
        self.batch = InputBatch.make_dummy(num_reqs, num_reqs, buffers)
        self.buffers = buffers
        self._add_requests(requests, sampling, block_tables, num_blocks, params, seeded)
        self._first = [tensor.clone() for tensor in self._moving()]

    def _add_requests(
        self,
        requests: RequestState,
        sampling: SamplingState,
        block_tables: tuple[torch.Tensor, ...],
        num_blocks: torch.Tensor,
        params: Mapping[str, Any],
        seeded: bool,
    ) -> None:
        """As the runner does it: all tokens but the last are prefilled, the last was sampled."""
        prompt_lens, total_lens = requests.prompt_len.tolist(), requests.total_len.tolist()
        for row, total_len in enumerate(total_lens):
            prefilled = requests.all_token_ids[row, : total_len - 1].tolist()
            self.requests.add_request(
                str(row), prompt_lens[row], prefilled, total_len - 1, max_tokens=1
            )
            seed = int(sampling.seeds[row]) if seeded else None
            self.sampler.add_request(row, SamplingParams(**params, seed=seed))
            blocks = tuple(
                table[row, : int(num_blocks[group, row])].tolist()
                for group, table in enumerate(block_tables)
            )
            self.block_tables.append_block_ids(row, blocks, overwrite=True)
        self.requests.apply_staged_writes()
        self.sampler.apply_staged_writes()
        self.block_tables.apply_staged_writes()
        ones = torch.ones_like(self.batch.seq_lens)
        self._append(requests.last_sampled_tokens, ones, torch.zeros_like(ones), None)

    @property
    def has_faster_sampler(self) -> bool:
        """Would rows without seeds be sampled by FlashInfer?"""
        states, rows = self.sampler.sampling_states, self.batch.idx_mapping_np
        truncates = (states.top_k.np[rows] != states.vocab_size) | (states.top_p.np[rows] != 1)
        return bool(truncates.any() and self.sampler.use_flashinfer)

    def rewind(self) -> None:
        """Back to the first step; the counts and the tokens written stay."""
        for tensor, first in zip(self._moving(), self._first, strict=True):
            tensor.copy_(first)
        self._prepare()

    def fresh(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits for one ``step``, which leaves them as they are."""
        return logits

    def step(self, logits: torch.Tensor) -> Sampled:
        """Sample from ``logits`` [num_reqs, V], append the tokens, make the next step's inputs."""
        output = self.sampler(logits, self.batch)
        self._append(
            output.sampled_token_ids,
            output.num_sampled,
            output.num_rejected,
            self.batch.query_start_loc,
        )
        self._prepare()
        return _sampled(output)

    def expected(self, logits: torch.Tensor) -> Sampled:
        """The outputs that ours must have; takes a step."""
        return self.step(logits)

    def tokens(self, start: int, count: int) -> torch.Tensor:
        """Token ids [num_reqs, count] int32 from position ``start``."""
        all_token_ids: torch.Tensor = self.requests.all_token_ids.gpu
        return all_token_ids[:, start : start + count]

    def _moving(self) -> tuple[torch.Tensor, ...]:
        state = self.requests
        return state.num_computed_tokens.gpu, state.total_len.gpu, state.last_sampled_tokens

    def _append(
        self,
        tokens: torch.Tensor,  # [num_reqs, 1] int64
        num_sampled: torch.Tensor,  # [num_reqs] int32
        num_rejected: torch.Tensor,  # [num_reqs] int32
        query_start_loc: torch.Tensor | None,  # [num_reqs + 1] int32
    ) -> None:
        """``GPUModelRunner.postprocess_sampled``."""
        post_update(
            self.batch.idx_mapping,
            self.requests.num_computed_tokens.gpu,
            self.requests.last_sampled_tokens,
            self.sampler.penalties_state.output_bin_counts,
            tokens,
            num_sampled,
            num_rejected,
            query_start_loc,
            self.requests.all_token_ids.gpu,
            self.requests.total_len.gpu,
        )

    def _prepare(self) -> None:
        """``GPUModelRunner.prepare_inputs`` and ``prepare_attn``: their kernels."""
        batch, state = self.batch, self.requests
        prepare_pos_seq_lens(
            batch.idx_mapping,
            batch.query_start_loc,
            state.num_computed_tokens.gpu,
            self.buffers.positions,
            self.buffers.seq_lens,
        )
        batch.logits_indices = combine_sampled_and_draft_tokens(
            self.buffers.input_ids,
            batch.idx_mapping,
            state.last_sampled_tokens,
            batch.query_start_loc,
            batch.seq_lens,
            state.prefill_len.gpu,
            state.draft_tokens,
            batch.cu_num_logits,
            batch.num_reqs,
        )
        self.block_tables.gather_block_tables(batch.idx_mapping, batch.num_reqs)
        self.block_tables.compute_slot_mappings(
            batch.idx_mapping, batch.query_start_loc, batch.positions, batch.num_reqs
        )


class StockSampler:
    """The sampler of Model Runner V1, which vLLM runs on the CPU, and nothing else.

    That runner's other work of a step (sampling metadata, token bookkeeping, block tables) is
    Python between numpy arrays; it is left out. Rows have no seeds: they would cost a generator
    call each. The noise is not ours, so ``expected`` puts ours in its place.
    """

    has_faster_sampler = False

    def __init__(
        self, requests: RequestState, sampling: SamplingState, params: Mapping[str, Any]
    ) -> None:
        num_reqs, vocab_size = requests.output_bin_counts.shape
        parsed = SamplingParams(**params)
        _config().scheduler_config.max_num_seqs = num_reqs
        min_p = MinPLogitsProcessor(_config(), requests.total_len.device, False)
        added: list[Any] = [(row, parsed, [], []) for row in range(num_reqs)]
        min_p.update_state(BatchUpdate(num_reqs, removed=[], added=added, moved=[]))
        tokens, prompt_lens = requests.all_token_ids, requests.prompt_len.tolist()
        prompts = torch.full((num_reqs, max(prompt_lens)), vocab_size)
        for row, prompt_len in enumerate(prompt_lens):
            prompts[row, :prompt_len] = tokens[row, :prompt_len]
        lengths = list(enumerate(requests.total_len.tolist()))
        greedy = parsed.temperature == 0
        self.requests, self.sampling = requests, sampling
        self.metadata = SamplingMetadata(
            temperature=None if greedy else sampling.temperature,
            all_greedy=greedy,
            all_random=not greedy,
            top_p=None if parsed.top_p == 1 else sampling.top_p,
            top_k=None if parsed.top_k <= 0 else sampling.top_k,
            generators={},
            max_num_logprobs=parsed.logprobs,
            no_penalties=(
                parsed.repetition_penalty == 1
                and parsed.frequency_penalty == parsed.presence_penalty == 0
            ),
            prompt_token_ids=prompts,
            frequency_penalties=sampling.frequency_penalty,
            presence_penalties=sampling.presence_penalty,
            repetition_penalties=sampling.repetition_penalty,
            output_token_ids=[tokens[i, prompt_lens[i] : end].tolist() for i, end in lengths],
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=LogitsProcessors([min_p]),
        )
        self.sampler = SamplerV1()
        self.processing = SamplerV1("processed_logits")

    def rewind(self) -> None:
        """Nothing moves."""

    def fresh(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits for one ``step``, which writes into those in float32."""
        return logits.clone() if logits.dtype == torch.float32 else logits

    def step(self, logits: torch.Tensor) -> Sampled:
        """Sample from ``logits`` [num_reqs, V]."""
        return _sampled(self.sampler(logits, self.metadata))

    def expected(self, logits: torch.Tensor) -> Sampled:
        """The outputs that ours must have; call it before ours takes the step.

        Of sampled rows: the argmax of this sampler's processed logits and our noise.
        """
        if self.metadata.all_greedy:
            sampled = self.step(self.fresh(logits))
        else:
            processed = self.processing.apply_logits_processors(
                logits.float().clone(), self.metadata, predict_bonus_token=False
            )
            _, processed = self.processing.sample(processed, self.metadata)
            token_ids = torch.arange(logits.shape[1])
            for row, seed in enumerate(self.sampling.seeds.tolist()):
                position = int(self.requests.num_computed_tokens[row])
                processed[row] += gumbel_noise(seed, position, token_ids)
            sampled = Sampled(processed.argmax(-1), None, None)
        for output, token in zip(
            self.metadata.output_token_ids, sampled.tokens.tolist(), strict=True
        ):
            output.append(token)
        return sampled
