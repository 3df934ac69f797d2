"""The tokens of a speculative round and of its drafter, in their places, against the reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from ops.world import POISON, Implementation, World, assert_close, build_world, placed

from fusedstep.errors import TensorError
from fusedstep.ops.reference import ReferenceStep
from fusedstep.ops.types import PAD_SLOT_ID, RowTokens, TokenInputs, dtypes

NUM_REQS, MAX_LEN, ROOM = 6, 40, 64
DRAFTS = torch.arange(NUM_REQS * 3).view(NUM_REQS, 3) + 30


class Call(NamedTuple):
    """What ``place`` is asked."""

    width: int
    num_drafts: int = 0
    back: list[int] | None = None
    ahead: int = 0


# A round's verification; its drafter's first forward, and the ones behind it.
CALLS = [
    Call(4, num_drafts=3),
    Call(5, back=[1, 4, 2, 0, 3, 1]),
    Call(1, num_drafts=1, ahead=1),
    Call(1, num_drafts=2, ahead=2),
    Call(7, num_drafts=2),
]


def build(seed: int, block_sizes: tuple[int, ...]) -> World:
    """Row 2 is padding, row 4 rests; rows 0 and 1 come near max_model_len."""
    world = build_world(
        60, NUM_REQS, max_model_len=MAX_LEN, block_sizes=block_sizes, padding=(2,), seed=seed
    )
    req = world.rows.idx_mapping.tolist()
    for row, length in ((0, MAX_LEN - 1), (1, MAX_LEN - 3)):
        world.requests.num_computed_tokens[req[row]] = length
        world.requests.total_len[req[row]] = length + 1
    world.requests.stopped[req[4]] = True
    return world


def run(world: World, step_class: type, call: Call, device: str = "cpu") -> dict[str, torch.Tensor]:
    copy = world.clone(device)
    step = copy.bind(step_class)
    step.prepare(copy.rows, NUM_REQS)
    out = TokenInputs.allocate(NUM_REQS + 2, ROOM, len(world.block_tables), device)
    for name in dtypes(TokenInputs):
        getattr(out, name).fill_(POISON)
    back = call.back and placed(torch.tensor(call.back, dtype=torch.int32), device)
    drafts = placed(DRAFTS, device)
    tokens = RowTokens(call.width, drafts, call.num_drafts, back, call.ahead)
    step.place(copy.rows, NUM_REQS, out, tokens)
    return {name: getattr(out, name).cpu() for name in dtypes(TokenInputs)}


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("block_sizes", [(16,), (16, 32)], ids=str)
def test_tokens(implementation: Implementation, block_sizes: tuple[int, ...], call: Call) -> None:
    world = build(len(block_sizes), block_sizes)
    want = run(world, ReferenceStep, call)
    have = run(world, implementation.step_class, call, implementation.device)
    for name, expected in want.items():
        assert_close(name, ref=expected, out=have[name], rtol=0, atol=0)


def row(out: dict[str, torch.Tensor], name: str, number: int, width: int) -> list[Any]:
    found: list[Any] = out[name][..., number * width : (number + 1) * width].tolist()
    return found


def test_what_the_reference_does() -> None:
    """A row's known tokens, the last one sampled, its drafts; no slot for who rests."""
    world = build(0, (16,))
    req = world.rows.idx_mapping.tolist()
    known = world.requests.all_token_ids[req[3]].tolist()
    at = int(world.requests.num_computed_tokens[req[3]])

    verified = run(world, ReferenceStep, CALLS[0])
    assert row(verified, "input_ids", 3, 4) == [known[at], *DRAFTS[3].tolist()]
    assert row(verified, "positions", 3, 4) == list(range(at, at + 4))
    assert verified["seq_lens"][3] == at + 4 and verified["last_sampled"][3] == 12
    blocks = world.block_tables[0][req[3]].tolist()
    slots = [blocks[p // 16] * 16 + p % 16 for p in range(at, at + 4)]
    assert row(verified, "slot_mappings", 3, 4) == [slots]
    assert row(verified, "slot_mappings", 4, 4) == [[PAD_SLOT_ID] * 4]  # it has stopped
    assert row(verified, "positions", 0, 4) == [MAX_LEN - 1] * 4  # and no further
    assert row(verified, "input_ids", 2, 4) == [0] * 4 and verified["seq_lens"][2] == 0
    assert (verified["slot_mappings"][:, 4 * NUM_REQS :] == PAD_SLOT_ID).all()
    assert (verified["seq_lens"][NUM_REQS:] == 0).all()

    first = run(world, ReferenceStep, Call(5, back=[0, 0, 0, 3, 0, 0]))
    assert row(first, "input_ids", 3, 5) == [*known[at - 3 : at + 1], 0]
    assert first["last_sampled"][3] == 3 * 5 + 3 and first["seq_lens"][3] == at + 2

    behind = run(world, ReferenceStep, CALLS[3])
    assert row(behind, "input_ids", 3, 1) == [DRAFTS[3, 1]]
    assert row(behind, "positions", 3, 1) == [at + 2] and behind["seq_lens"][3] == at + 3


def test_no_room_is_named(implementation: Implementation) -> None:
    world = build(0, (16,)).clone(implementation.device)
    step = world.bind(implementation.step_class)
    drafts = placed(DRAFTS, implementation.device)
    out = TokenInputs.allocate(NUM_REQS, ROOM, 1, implementation.device)
    for wrong, width, name in (
        (drafts[:-1], 4, "drafts"),
        (drafts.int(), 4, "drafts"),
        (drafts, 11, "input_ids"),
    ):
        with pytest.raises(TensorError, match=f"^{name}: "):
            step.place(world.rows, NUM_REQS, out, RowTokens(width, wrong, 1))
    out = TokenInputs.allocate(NUM_REQS, ROOM, 1, implementation.device)
    object.__setattr__(out, "positions", out.positions.int())
    with pytest.raises(TensorError, match=r"^positions: "):
        step.place(world.rows, NUM_REQS, out, RowTokens(4, drafts, 1))
