"""The requests that ``bench kernels`` measures with, and our step on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedstep.ops import dispatch
from fusedstep.ops.types import (
    BatchNeeds,
    RequestState,
    SamplingState,
    StepInputs,
    StepState,
    StopState,
    WindowRows,
)
from fusedstep.vllm_plugin.reasons import MAX_STOP_TOKEN_IDS

PROMPT_LEN, CONTEXT_LEN = 512, 1024  # tokens of every request before the first step
BLOCK_SIZE = 16  # tokens of a KV cache block
MAX_NUM_TOKENS = 2048  # vLLM's default token budget of a step

Outputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # tokens, logprobs, ranks


@dataclass(frozen=True)
class State(StepState):
    """One request per row, alike but for their tokens and seeds."""

    rows: WindowRows

    def for_stock(self) -> tuple[Any, ...]:
        """The tensors that stock's step starts from."""
        return self.requests, self.sampling, self.inputs, self.block_tables, self.num_blocks


def build_state(
    params: dict[str, Any], num_reqs: int, vocab_size: int, num_steps: int, device: torch.device
) -> State:
    """Requests of CONTEXT_LEN random tokens that can take ``num_steps`` steps and do not stop."""
    generator = torch.Generator().manual_seed(1)
    width = math.ceil((CONTEXT_LEN + num_steps + 2) / BLOCK_SIZE)
    max_model_len = width * BLOCK_SIZE

    def random(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    tokens = random(vocab_size, num_reqs, max_model_len)
    in_prompt = torch.zeros(num_reqs, 32 * math.ceil(vocab_size / 32), dtype=torch.int64)
    in_prompt.scatter_(1, tokens[:, :PROMPT_LEN], 1)
    prompt_mask = (in_prompt.view(num_reqs, -1, 32) << torch.arange(32)).sum(-1)
    counts = torch.zeros(num_reqs, vocab_size, dtype=torch.int32)
    outputs = tokens[:, PROMPT_LEN:CONTEXT_LEN]
    counts.scatter_add_(1, outputs, torch.ones_like(outputs, dtype=torch.int32))
    rows = WindowRows.allocate(num_reqs, num_steps + 1, device)
    rows.idx_mapping.copy_(torch.arange(num_reqs))
    rows.steps_allowed.fill_(num_steps + 1)
    # All rows with ``params``, every other option off and its table as wide as vLLM's widest.
    sampling = SamplingState.off(num_reqs, vocab_size, device, width=1024)
    for name in params.keys() & SamplingState.parameters():  # the rest asks for outputs
        getattr(sampling, name).fill_(params[name])
    return State(
        requests=RequestState(
            last_sampled_tokens=tokens[:, CONTEXT_LEN - 1 : CONTEXT_LEN].contiguous().to(device),
            num_computed_tokens=full(CONTEXT_LEN - 1, num_reqs),
            total_len=full(CONTEXT_LEN, num_reqs),
            prompt_len=full(PROMPT_LEN, num_reqs),
            all_token_ids=tokens.int().to(device),
            prompt_bin_mask=prompt_mask.int().to(device),
            output_bin_counts=counts.to(device),
            stopped=full(0, num_reqs, dtype=torch.bool),
        ),
        sampling=replace(sampling, seeds=random(1 << 62, num_reqs).to(device)),
        stop=StopState(
            max_len=full(max_model_len + 1, num_reqs),
            num_stop_token_ids=full(1, num_reqs),
            stop_token_ids=full(-1, num_reqs, MAX_STOP_TOKEN_IDS + 1),  # no token is -1
        ),
        inputs=StepInputs(
            input_ids=full(0, MAX_NUM_TOKENS),
            positions=full(0, MAX_NUM_TOKENS, dtype=torch.int64),
            seq_lens=full(0, num_reqs),
            slot_mappings=full(0, 1, MAX_NUM_TOKENS, dtype=torch.int64),
            input_block_tables=(full(0, num_reqs, width),),
            block_sizes=(BLOCK_SIZE,),
            sliding_reach=(0,),
        ),
        block_tables=(random(1 << 20, num_reqs, width).int().to(device),),
        num_blocks=full(width, 1, num_reqs),
        rows=rows,
    )


def _truncation(name: str, state: State) -> dict[str, Any]:
    """Arguments that a runner adds to the state: on a GPU, stock vLLM's top-k and top-p."""
    device = state.requests.total_len.device
    if name != "triton" or device.type == "cpu":
        return {}
    from fusedstep.ops.triton_step import TritonStep
    from fusedstep.vllm_plugin.runner.truncation import allocate_buffers, truncate_as_stock

    num_reqs, vocab_size = state.requests.output_bin_counts.shape
    scratch = TritonStep.allocate_scratch(num_reqs, vocab_size, device)
    allocate_buffers(scratch.adjusted, scratch.limit_k, scratch.limit_p)
    return {"scratch": scratch, "truncation": truncate_as_stock}


class FusedStep:
    """Our step on its own state."""

    def __init__(self, name: str, state: State, needs: BatchNeeds) -> None:
        self.requests, self.sampling = state.requests, state.sampling
        self.rows, self.needs = state.rows, needs
        self.num_reqs = len(state.rows.idx_mapping)
        self.ops = dispatch.load(name)(state, **_truncation(name, state))
        self._first = [tensor.clone() for tensor in self._moving()]

    def rewind(self) -> None:
        """Back to the first step of a window; the counts and the tokens written stay."""
        for tensor, first in zip(self._moving(), self._first, strict=True):
            tensor.copy_(first)
        self.ops.prepare(self.rows, self.num_reqs)

    def fresh(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits for one ``step``, which leaves them as they are."""
        return logits

    def step(self, logits: torch.Tensor) -> Outputs:
        """A step of all rows; the outputs are those of the last step."""
        rows = self.rows
        self.ops.step(logits, rows, self.num_reqs, self.needs)
        if not self.needs.logprobs:
            return rows.sampled, None, None
        return rows.sampled, rows.logprobs, rows.ranks

    def tokens(self, start: int, count: int) -> torch.Tensor:
        """Token ids [num_reqs, count] int32 from position ``start``."""
        return self.requests.all_token_ids[:, start : start + count]

    def _moving(self) -> tuple[torch.Tensor, ...]:
        state = self.requests
        return state.num_computed_tokens, state.total_len, state.last_sampled_tokens
