"""A small world of requests for the step operations, and its run by two implementations."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from fusedstep.ops.reference import ReferenceStep
from fusedstep.ops.types import (
    BatchNeeds,
    RequestState,
    SamplingState,
    StepInputs,
    StepState,
    StopState,
    WindowRows,
    off_value,
)

POISON = -77  # what outputs hold before a call
PROMPT_LEN = 4
MAX_STOP_TOKEN_IDS = 129  # 128 of the user's and EOS
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class World(StepState):
    """Everything a step is bound to, and one window's rows, of which ``num_reqs`` are used."""

    rows: WindowRows
    num_reqs: int

    @property
    def vocab_size(self) -> int:
        return self.requests.output_bin_counts.shape[1]

    def bind(self, step_class: type) -> Any:
        return step_class(self)

    def clone(self, device: str = "cpu") -> World:
        def copied(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.clone().to(device)
            if isinstance(value, tuple):
                return tuple(map(copied, value))
            if is_dataclass(value) and not isinstance(value, type):
                changes = {f.name: copied(getattr(value, f.name)) for f in fields(value)}
                return replace(value, **changes)
            return value

        world: World = copied(self)
        return world

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor a step may write, by name."""
        found: dict[str, torch.Tensor] = {}
        for part in (self.requests, self.inputs, self.rows):
            for field in fields(part):
                value = getattr(part, field.name)
                if isinstance(value, torch.Tensor):
                    found[field.name] = value
        tables = enumerate(self.inputs.input_block_tables)
        return found | {f"input_block_tables[{group}]": table for group, table in tables}

    def needs(self, *, logprobs: bool = False) -> BatchNeeds:
        """What the host would stage for these rows: nothing that no row has."""
        sampling, reqs = self.sampling, self.rows.idx_mapping[: self.num_reqs]
        rows = reqs[reqs >= 0]
        needs = {"logprobs": logprobs}
        for name, spec in SamplingState.parameters().items():
            if spec.need is not None:
                asks = getattr(sampling, name) != off_value(spec, self.vocab_size)
                if spec.need != "adjustment":  # a greedy row's token is not drawn
                    asks &= sampling.temperature > 0
                needs[spec.need] = needs.get(spec.need, False) or bool(asks[rows].any())
        return BatchNeeds(**needs)


@dataclass(frozen=True)
class Implementation:
    """Step operations under test, and where their tensors live."""

    name: str
    step_class: type
    device: str

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter takes milliseconds for what others do in microseconds."""
        return self.name == "triton" and self.device == "cpu"


def assert_close(
    name: str, *, ref: torch.Tensor, out: torch.Tensor, rtol: float, atol: float
) -> None:
    """The one comparison of the step tests; NaN equals NaN."""
    torch.testing.assert_close(
        out, ref, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def assert_same(ref: World, out: World) -> None:
    """Both worlds hold the same values everywhere; logprobs may differ by their rounding."""
    written = out.tensors()
    for name, expected in ref.tensors().items():
        tolerance = 1e-5 if name == "logprobs" else 0.0
        assert_close(name, ref=expected, out=written[name].cpu(), rtol=tolerance, atol=tolerance)


def strided(logits: torch.Tensor, row_stride: int, offset: int) -> torch.Tensor:
    """The same logits in rows ``row_stride`` apart, with +inf around them: a trap for readers."""
    num_rows, vocab_size = logits.shape
    buffer = torch.full((offset + num_rows * row_stride + 5000,), torch.inf, dtype=logits.dtype)
    view = buffer.as_strided((num_rows, vocab_size), (row_stride, 1), offset)
    view.copy_(logits)
    return view


def placed(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on ``device``, with its strides, its offset and all that is around it."""
    if device == "cpu":
        return tensor
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    place = (tensor.shape, tensor.stride(), tensor.storage_offset())
    return whole.to(device).as_strided(*place)


def run(
    world: World,
    step_class: type,
    logits: torch.Tensor,
    *,
    needs: BatchNeeds | None = None,
    call: str = "step",
    device: str = "cpu",
) -> World:
    """``prepare`` and one ``call``, which leaves the logits alone, on a copy of the world."""
    copy, n = world.clone(device), world.num_reqs
    step = copy.bind(step_class)
    step.prepare(copy.rows, n)
    theirs = placed(logits.clone() if logits.is_contiguous() else logits, device)
    before = logits.clone()
    getattr(step, call)(theirs, copy.rows, n, needs or world.needs())
    assert_close("logits", ref=before, out=theirs.cpu(), rtol=0, atol=0)
    return copy.clone()


def compare(
    world: World, logits: torch.Tensor, implementation: Implementation, **options: Any
) -> list[int]:
    """Run reference and implementation, all state must be equal; returns ``rows.sampled``."""
    ref = run(world, ReferenceStep, logits, **options)
    device = implementation.device
    out = run(world, implementation.step_class, logits, device=device, **options)
    assert_same(ref, out)
    tokens: list[int] = ref.rows.sampled[: world.num_reqs].tolist()
    return tokens


def random_logits(
    num_rows: int, vocab_size: int, *, seed: int = 0, scale: float = 4.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def build_world(
    vocab_size: int,
    num_reqs: int,
    *,
    max_num_reqs: int | None = None,
    max_model_len: int = 96,
    block_sizes: tuple[int, ...] = (16,),
    sliding_reach: tuple[int, ...] | None = None,
    num_steps: int = 8,
    padding: tuple[int, ...] = (),
    seed: int = 0,
) -> World:
    """Requests in random rows and at random lengths, all options off, temperature 1.

    ``padding`` are batch indices without a request.
    """
    size = max_num_reqs or num_reqs + 3
    generator = torch.Generator().manual_seed(seed)

    def randint(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def int32(*shape: int, value: int = 0) -> torch.Tensor:
        return torch.full(shape, value, dtype=torch.int32)

    num_computed = randint(PROMPT_LEN, 20, size).int()
    all_token_ids = randint(0, vocab_size, size, max_model_len).int()
    last = all_token_ids.gather(1, num_computed[:, None].long()).long()
    widths = [-(-max_model_len // block_size) for block_size in block_sizes]
    world = World(
        requests=RequestState(
            last_sampled_tokens=last,
            num_computed_tokens=num_computed,
            total_len=num_computed + 1,
            prompt_len=int32(size, value=PROMPT_LEN),
            all_token_ids=all_token_ids,
            prompt_bin_mask=int32(size, -(-vocab_size // 32)),
            output_bin_counts=int32(size, vocab_size),
            stopped=torch.zeros(size, dtype=torch.bool),
        ),
        sampling=replace(
            SamplingState.off(size, vocab_size),
            temperature=torch.ones(size),
            seeds=randint(-(2**63), 2**63 - 1, size),
        ),
        stop=StopState(
            max_len=int32(size, value=max_model_len),
            num_stop_token_ids=int32(size),
            stop_token_ids=int32(size, MAX_STOP_TOKEN_IDS, value=POISON),
        ),
        inputs=StepInputs(
            input_ids=int32(size + 8, value=POISON),
            positions=torch.full((size + 8,), POISON),
            seq_lens=int32(size, value=POISON),
            slot_mappings=torch.full((len(block_sizes), size + 8), POISON),
            input_block_tables=tuple(int32(size, width, value=POISON) for width in widths),
            block_sizes=block_sizes,
            sliding_reach=sliding_reach or (0,) * len(block_sizes),
        ),
        block_tables=tuple(randint(1, 10**6, size, width).int() for width in widths),
        num_blocks=torch.tensor(widths, dtype=torch.int32)[:, None].repeat(1, size),
        rows=poisoned_rows(size, num_steps),
        num_reqs=num_reqs,
    )
    world.rows.idx_mapping[:num_reqs] = torch.randperm(size, generator=generator)[:num_reqs]
    world.rows.idx_mapping[list(padding)] = -1
    world.rows.steps_allowed[:num_reqs] = num_steps
    for req in range(size):
        count_tokens(world, req)
    return world


def count_tokens(world: World, req: int) -> None:
    """Prompt mask and output counts of one request, from its tokens."""
    requests, vocab_size = world.requests, world.vocab_size
    prompt_len, total_len = int(requests.prompt_len[req]), int(requests.total_len[req])
    tokens = requests.all_token_ids[req].long()
    counts = torch.bincount(tokens[prompt_len:total_len], minlength=vocab_size)
    requests.output_bin_counts[req] = counts.int()
    mask = torch.zeros(-(-vocab_size // 32) * 32, dtype=torch.int64)
    mask[tokens[:prompt_len]] = 1
    packed = (mask.view(-1, 32) << torch.arange(32)).sum(-1)
    requests.prompt_bin_mask[req] = packed.to(torch.int32)


def poisoned_rows(size: int, num_steps: int) -> WindowRows:
    rows = WindowRows.allocate(size, num_steps)
    for tensor in vars(rows).values():
        tensor.fill_(POISON)
    rows.logprobs.fill_(torch.nan)
    rows.stop_weight.fill_(1)
    return rows
