"""A small world of requests for the step operations, and the means to vary it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from fusedstep.ops.types import RequestState, SamplingState, StepInputs, StopState, WindowRows

POISON = -77  # what outputs hold before a call
PROMPT_LEN = 4


@dataclass
class World:
    """Everything a step is bound to, and one window's rows."""

    requests: RequestState
    sampling: SamplingState
    stop: StopState
    inputs: StepInputs
    block_tables: tuple[torch.Tensor, ...]
    num_blocks: torch.Tensor
    rows: WindowRows

    @property
    def num_reqs(self) -> int:
        return len(self.rows.idx_mapping)

    def bind(self, step_class: type) -> Any:
        return step_class(
            self.requests,
            self.sampling,
            self.stop,
            self.inputs,
            self.block_tables,
            self.num_blocks,
        )

    def clone(self) -> World:
        return copy.deepcopy(self)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor a step may write, by name."""
        found: dict[str, torch.Tensor] = {}
        for part in (self.requests, self.inputs, self.rows):
            for field in fields(part):
                value = getattr(part, field.name)
                if isinstance(value, torch.Tensor):
                    found[field.name] = value
        tables = enumerate(self.inputs.input_block_tables)
        return found | {f"input_block_table_{group}": table for group, table in tables}


def assert_same(ref: World, out: World) -> None:
    """Both worlds hold the same values everywhere."""
    written = out.tensors()
    for name, expected in ref.tensors().items():
        assert torch.equal(written[name], expected), f"{name}: {written[name]} is not {expected}"


def build_world(
    vocab_size: int,
    num_reqs: int,
    *,
    max_num_reqs: int | None = None,
    max_model_len: int = 96,
    block_sizes: tuple[int, ...] = (16,),
    num_steps: int = 8,
    seed: int = 0,
) -> World:
    """Requests in random rows and at random lengths, all options off, temperature 1."""
    size = max_num_reqs or num_reqs + 3
    generator = torch.Generator().manual_seed(seed)

    def randint(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def int32(*shape: int, value: int = 0) -> torch.Tensor:
        return torch.full(shape, value, dtype=torch.int32)

    num_computed = randint(PROMPT_LEN, 20, size).int()
    all_token_ids = randint(0, vocab_size, size, max_model_len).int()
    prompt_mask = torch.zeros(size, -(-vocab_size // 32) * 32, dtype=torch.int64)
    prompt_mask.scatter_(1, all_token_ids[:, :PROMPT_LEN].long(), 1)
    packed = (prompt_mask.view(size, -1, 32) << torch.arange(32)).sum(-1)
    counts = int32(size, vocab_size)
    for req in range(size):
        output = all_token_ids[req, PROMPT_LEN : num_computed[req] + 1].long()
        counts[req].index_add_(0, output, torch.ones_like(output).int())
    last = all_token_ids.gather(1, num_computed[:, None].long()).long()
    widths = [-(-max_model_len // block_size) for block_size in block_sizes]
    return World(
        requests=RequestState(
            last_sampled_tokens=last,
            num_computed_tokens=num_computed,
            total_len=num_computed + 1,
            prompt_len=int32(size, value=PROMPT_LEN),
            all_token_ids=all_token_ids,
            prompt_bin_mask=packed.to(torch.int32),
            output_bin_counts=counts,
            stopped=torch.zeros(size, dtype=torch.bool),
        ),
        sampling=_neutral_sampling(size, vocab_size, randint(-(2**63), 2**63 - 1, size)),
        stop=StopState(
            max_len=int32(size, value=max_model_len),
            num_stop_token_ids=int32(size),
            stop_token_ids=int32(size, 4, value=POISON),
        ),
        inputs=StepInputs(
            input_ids=int32(size + 8, value=POISON),
            positions=torch.full((size + 8,), POISON),
            seq_lens=int32(size, value=POISON),
            slot_mappings=torch.full((len(block_sizes), size + 8), POISON),
            input_block_tables=tuple(int32(size, width, value=POISON) for width in widths),
            block_sizes=block_sizes,
        ),
        block_tables=tuple(randint(1, 10**6, size, width).int() for width in widths),
        num_blocks=torch.tensor(widths, dtype=torch.int32)[:, None].repeat(1, size),
        rows=WindowRows(
            idx_mapping=torch.randperm(size, generator=generator)[:num_reqs].clone(),
            budget=int32(num_reqs, value=num_steps),
            active=torch.ones(num_reqs, dtype=torch.bool),
            sampled=torch.full((num_reqs,), POISON),
            num_sampled=int32(num_reqs, value=POISON),
            out_tokens=torch.full((num_steps, num_reqs), POISON),
        ),
    )


def _neutral_sampling(size: int, vocab_size: int, seeds: torch.Tensor) -> SamplingState:
    def int32(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    return SamplingState(
        temperature=torch.ones(size),
        seeds=seeds,
        top_k=torch.full((size,), vocab_size, dtype=torch.int32),
        top_p=torch.ones(size),
        min_p=torch.zeros(size),
        repetition_penalty=torch.ones(size),
        frequency_penalty=torch.zeros(size),
        presence_penalty=torch.zeros(size),
        num_allowed_token_ids=int32(size),
        allowed_token_ids=int32(size, 1024),
        num_logit_bias=int32(size),
        logit_bias_token_ids=int32(size, 1024),
        logit_bias=torch.zeros(size, 1024),
        min_lens=int32(size),
        num_min_stop_token_ids=int32(size),
        min_stop_token_ids=int32(size, 128),
        num_bad_words=int32(size),
        bad_word_token_ids=int32(size, 100),
        bad_word_offsets=int32(size, 11),
    )


@pytest.fixture
def make_world() -> Callable[..., World]:
    return build_world


@pytest.fixture
def same() -> Callable[[World, World], None]:
    return assert_same
