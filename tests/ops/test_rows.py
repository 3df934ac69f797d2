"""A window's rows: who is active, their inputs and slots, the stop rule, many steps in a row."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.options import COMBINATIONS, set_options
from ops.world import (
    MAX_STOP_TOKEN_IDS,
    POISON,
    PROMPT_LEN,
    Implementation,
    World,
    assert_same,
    build_world,
    count_tokens,
    random_logits,
)

from fusedstep.ops.reference import ReferenceStep
from fusedstep.ops.types import PAD_SLOT_ID


class Pair:
    """The same world twice: one for the reference, one for the implementation."""

    def __init__(self, world: World, implementation: Implementation) -> None:
        self.ref, self.out = world, world.clone(implementation.device)
        self.steps = (
            self.ref.bind(ReferenceStep),
            self.out.bind(implementation.step_class),
        )
        self.num_reqs = world.num_reqs

    def copy_to_device(self) -> None:
        """After the host has changed the reference's world."""
        for part in ("requests", "sampling", "stop", "rows"):
            theirs = vars(getattr(self.out, part))
            for name, tensor in vars(getattr(self.ref, part)).items():
                theirs[name].copy_(tensor)

    def prepare(self) -> None:
        for step, world in zip(self.steps, (self.ref, self.out), strict=True):
            step.prepare(world.rows, self.num_reqs)
        assert_same(self.ref, self.out)

    def step(self, logits: torch.Tensor, *, logprobs: bool = False) -> None:
        needs = self.ref.needs(logprobs=logprobs)
        for step, world in zip(self.steps, (self.ref, self.out), strict=True):
            rows = logits.to(world.rows.active.device)
            step.step(rows, world.rows, self.num_reqs, needs)
        assert_same(self.ref, self.out)


def forced(tokens: list[int], vocab_size: int) -> torch.Tensor:
    """Logits that leave one token per row."""
    logits = torch.full((len(tokens), vocab_size), -torch.inf)
    logits[torch.arange(len(tokens)), tokens] = 0.0
    return logits


def refill(world: World, req: int, generator: torch.Generator) -> None:
    """A new request enters the row of one that has stopped."""
    requests = world.requests
    total_len = int(torch.randint(PROMPT_LEN + 1, 12, (), generator=generator))
    requests.total_len[req] = total_len
    requests.num_computed_tokens[req] = total_len - 1
    requests.last_sampled_tokens[req, 0] = requests.all_token_ids[req, total_len - 1]
    requests.stopped[req] = False
    world.sampling.seeds[req] += 1
    world.stop.max_len[req] = total_len + int(torch.randint(1, 25, (), generator=generator))
    count_tokens(world, req)


@pytest.mark.parametrize("block_sizes", [(), (16, 5)], ids=str)
def test_fifty_steps(implementation: Implementation, block_sizes: tuple[int, ...]) -> None:
    """Windows of mixed options, budgets, stops, refills, padding and size; equal in all state."""
    n, size, vocab_size = 6, 9, 63
    generator = torch.Generator().manual_seed(len(block_sizes))
    world = build_world(vocab_size, n, max_num_reqs=size, block_sizes=block_sizes)
    preferences = random_logits(size, vocab_size, seed=3, scale=2.0)
    preferences[:, [5, 9, vocab_size - 1]] += 2  # the stop tokens
    world.rows.idx_mapping[:size] = torch.arange(size)
    everyone = World(**vars(world) | {"num_reqs": size})
    combinations = COMBINATIONS[-size - len(block_sizes) :]
    for req in range(size):
        set_options(everyone, req, combinations[req], preferences)
    world.stop.num_stop_token_ids[::2] = 3
    world.stop.stop_token_ids[:, :3] = torch.tensor([5, 9, vocab_size - 1]).int()
    world.stop.max_len[:] = torch.arange(20, 20 + 5 * size, 5).int()
    pair = Pair(world, implementation)
    num_refilled = 0
    for window in range(7):
        requests = pair.ref.requests
        stopped = requests.stopped.nonzero().flatten().tolist()
        for req in stopped[:2]:
            refill(pair.ref, req, generator)
        num_refilled += len(stopped[:2])
        rows = pair.ref.rows
        rows.idx_mapping[:n] = torch.randperm(size, generator=generator)[:n]
        pair.num_reqs = n - window % 3
        rows.idx_mapping[[window % n, pair.num_reqs - 1]] = -1
        rows.steps_allowed[:n] = torch.randint(0, 9, (n,), generator=generator).int()
        pair.copy_to_device()
        pair.prepare()
        for _ in range(8):
            logits = torch.randn(pair.num_reqs, vocab_size, generator=generator) * 2
            logits += preferences[rows.idx_mapping[: pair.num_reqs]]
            pair.step(logits.bfloat16(), logprobs=window == 3)
    assert num_refilled > 3, "the test should see rows stop and come back"


def test_windows_of_many_budgets(implementation: Implementation) -> None:
    """A row takes its steps, then waits: it keeps its position and has no slot."""
    pair = Pair(build_world(63, 4, block_sizes=(16, 8)), implementation)
    world = pair.out
    for rows in (pair.ref.rows, world.rows):
        rows.steps_allowed[:4] = torch.tensor([1, 0, 2, 3]).int()
    pair.prepare()
    assert world.rows.num_active.item() == 3
    slots = world.inputs.slot_mappings
    assert (slots[:, 1] == PAD_SLOT_ID).all() and (slots[:, 4:] == PAD_SLOT_ID).all()
    assert (slots[:, [0, 2, 3]] >= 0).all()
    assert (world.inputs.seq_lens[4:] == 0).all()
    positions = world.inputs.positions[:4].clone().cpu()
    for step, num_active in enumerate([2, 1, 0, 0]):
        pair.step(random_logits(4, 63, seed=step))
        assert world.rows.num_active.item() == num_active
        budgets = torch.tensor([1, 0, 2, 3])
        waiting = budgets <= step + 1
        assert ((slots[:, :4] == PAD_SLOT_ID).cpu() == waiting).all()
        moved = torch.clamp((budgets - 1).clamp(min=0), max=step + 1)
        assert world.inputs.positions[:4].tolist() == (positions + moved).tolist()
    assert world.rows.num_sampled[:4].tolist() == [1, 0, 2, 3]
    tokens = world.rows.out_tokens.cpu()
    assert (tokens[:4, 3] != POISON).tolist() == [True] * 3 + [False]


def test_a_stop_may_end_the_window(implementation: Implementation) -> None:
    """Nothing is left to go on for; a step enqueued ahead still gives the other rows a token."""
    pair = Pair(build_world(63, 4), implementation)
    for world in (pair.ref, pair.out):
        world.rows.stop_weight.fill_(40)
        world.rows.steps_allowed[3] = 1
        row = int(world.rows.idx_mapping[1])
        world.stop.max_len[row] = int(world.requests.total_len[row]) + 2
    pair.prepare()
    for step, active in enumerate([4 - 1, 3 - 40, 3 - 40]):
        pair.step(random_logits(4, 63, seed=step))
        assert pair.out.rows.num_active.item() == active
    assert pair.out.rows.num_sampled[:4].tolist() == [3, 2, 3, 1]


def test_padding_rows(implementation: Implementation) -> None:
    """In the middle and at the end: position, length and token 0, no slot, nothing else touched."""
    pair = Pair(build_world(63, 5, padding=(1, 4), block_sizes=(4,)), implementation)
    tables = pair.out.inputs.input_block_tables[0].clone()
    pair.prepare()
    inputs = pair.out.inputs
    for tensor in (inputs.input_ids, inputs.positions, inputs.seq_lens):
        assert tensor[[1, 4]].tolist() == [0, 0]
    assert inputs.slot_mappings[0, [1, 4]].tolist() == [PAD_SLOT_ID] * 2
    assert torch.equal(inputs.input_block_tables[0][[1, 4]], tables[[1, 4]])
    assert pair.out.rows.num_active.item() == 3
    pair.step(random_logits(5, 63))
    assert pair.out.rows.num_sampled[:5].tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("num_reqs", [0, 1, 64])
def test_prepare(implementation: Implementation, num_reqs: int) -> None:
    """Some rows stopped, some without steps, block tables of every length."""
    world = build_world(63, num_reqs, block_sizes=(4, 16, 1), max_model_len=1500)
    generator = torch.Generator().manual_seed(num_reqs)
    size = len(world.requests.stopped)
    world.requests.stopped[:] = torch.rand(size, generator=generator) < 0.3
    world.rows.steps_allowed[:] = torch.randint(0, 3, (size,), generator=generator).int()
    for group, table in enumerate(world.block_tables):
        most = table.shape[1]
        fewest = -(-24 // world.inputs.block_sizes[group])
        lengths = torch.randint(fewest, most + 1, (size,), generator=generator)
        world.num_blocks[group] = lengths.int()
    Pair(world, implementation).prepare()


def attended(table: torch.Tensor, position: int, reach: int, values: torch.Tensor) -> float:
    """The sum of ``values`` [num_blocks, block_size] in a row's sliding window, by a kernel that
    also loads those below it, and multiplies them by 0."""
    at = torch.arange(position + 1)
    size = values.shape[1]
    weights = (at >= position - reach).to(values.dtype)
    return float(weights @ values[table.cpu().long()[at // size], at % size])


@pytest.mark.parametrize("nulls", [True, False], ids=["nulls", "leaves"])
def test_blocks_below_a_sliding_window(implementation: Implementation, nulls: bool) -> None:
    """They may be somebody else's by now, with a NaN in them: without the null block in their place
    a row's attention has it."""
    reach, size = 21, 4
    world = build_world(
        63,
        32,
        max_num_reqs=32,
        max_model_len=6000,
        block_sizes=(size, 8),
        sliding_reach=(reach if nulls else 0, 0),
    )
    positions = world.requests.num_computed_tokens
    positions[:] = torch.cat([torch.arange(29), torch.tensor([4095, 4142, 5999])]).int()
    table, whole = world.block_tables
    for each in (table, whole):
        each[:] = 1 + torch.randperm(each.numel()).view(each.shape).int()
    values = torch.rand(1 + table.numel(), size, dtype=torch.float64)
    values[0] = 0
    expected, num_below = [], []
    for row, position in zip(table, positions.tolist(), strict=True):
        expected.append(attended(row, position, reach, values))
        last_tokens = torch.arange(len(row)) * size + size - 1
        below = last_tokens < position - reach
        values[row[below].long()] = torch.nan
        num_below.append(int(below.sum()))
    assert {0, 1} < set(num_below)
    pair = Pair(world, implementation)
    pair.prepare()
    for inputs in (pair.ref.inputs, pair.out.inputs):
        for batch_idx, req in enumerate(world.rows.idx_mapping.tolist()):
            row = inputs.input_block_tables[0][batch_idx]
            found = attended(row, int(positions[req]), reach, values)
            assert math.isnan(found) if num_below[req] and not nulls else found == expected[req]
            assert torch.equal(inputs.input_block_tables[1][batch_idx].cpu(), whole[req])


def test_slots_beyond_32_bits(implementation: Implementation) -> None:
    """Block ids times block size do not fit an int32."""
    world = build_world(63, 3, block_sizes=(1600,), max_model_len=3200)
    world.block_tables[0].add_(2**31 - 2 * 10**6)
    pair = Pair(world, implementation)
    pair.prepare()
    assert (pair.out.inputs.slot_mappings[0, :3] > 2**40).all()
    pair.step(random_logits(3, 63))


@pytest.mark.parametrize("stop_at", [0, 1, 63, 127, 128])
def test_each_of_129_stop_tokens(implementation: Implementation, stop_at: int) -> None:
    """The row whose token is at ``stop_at`` of its list stops; where the list is shorter it not."""
    assert MAX_STOP_TOKEN_IDS == 129
    world = build_world(1000, 4)
    reqs = world.rows.idx_mapping[:4]
    world.stop.stop_token_ids[:] = torch.arange(500, 500 + 129).int()
    world.stop.num_stop_token_ids[reqs] = torch.tensor([129, stop_at + 1, stop_at, 0]).int()
    pair = Pair(world, implementation)
    pair.prepare()
    pair.step(forced([500 + stop_at] * 4, 1000))
    assert pair.out.requests.stopped[reqs].tolist() == [True, True, False, False]
    assert pair.out.rows.num_active.item() == 2


@st.composite
def requests_with_stop_rules(draw: st.DrawFn) -> dict[str, object]:
    return {
        "token": draw(st.integers(0, 9)),
        "num_output": draw(st.integers(1, 6)),
        "max_tokens": draw(st.integers(1, 6)),
        "eos": draw(st.none() | st.integers(0, 9)),
        "stop_ids": draw(st.lists(st.integers(0, 9), max_size=3)),
    }


@settings(max_examples=12, deadline=None)
@given(
    cases=st.lists(requests_with_stop_rules(), min_size=8, max_size=8),
    max_model_len=st.integers(5, 12),
)
def test_stop_rule_is_check_stop(
    implementation: Implementation, cases: list[dict[str, object]], max_model_len: int
) -> None:
    """A row stops exactly when vLLM's scheduler would stop the request."""
    from vllm.v1.core.sched.utils import check_stop

    world = build_world(10, len(cases), max_num_reqs=len(cases), max_model_len=24)
    expected = []
    for req, case in enumerate(SimpleNamespace(**case) for case in cases):
        request = SimpleNamespace(
            pooling_params=None,
            sampling_params=SimpleNamespace(
                eos_token_id=case.eos,
                stop_token_ids=case.stop_ids,
                min_tokens=0,
                repetition_detection=None,
            ),
            output_token_ids=[case.token] * case.num_output,
            num_tokens=PROMPT_LEN + case.num_output,
            num_output_tokens=case.num_output,
            max_tokens=case.max_tokens,
        )
        expected.append(check_stop(request, max_model_len))
        stop_ids = case.stop_ids + ([] if case.eos is None else [case.eos])
        world.requests.total_len[req] = PROMPT_LEN + case.num_output - 1
        world.requests.num_computed_tokens[req] = world.requests.total_len[req] - 1
        world.stop.max_len[req] = min(PROMPT_LEN + case.max_tokens, max_model_len)
        world.stop.num_stop_token_ids[req] = len(stop_ids)
        world.stop.stop_token_ids[req, : len(stop_ids)] = torch.tensor(stop_ids).int()
    pair = Pair(world, implementation)
    pair.prepare()
    tokens = [cases[req]["token"] for req in world.rows.idx_mapping[: len(cases)].tolist()]
    pair.step(forced(tokens, 10))
    assert pair.out.requests.stopped.tolist() == expected
    assert pair.out.rows.num_active.item() == expected.count(False)
