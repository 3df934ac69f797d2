"""A speculative round's tokens: taken by their rows, against the reference."""

from __future__ import annotations

import pytest
import torch
from ops.world import Implementation, World, assert_close, assert_same, build_world, placed

from fusedstep.errors import TensorError
from fusedstep.ops.reference import ReferenceStep

NUM_REQS, WIDTH = 7, 4


def build(seed: int) -> World:
    """Row 2 is padding, row 4 has stopped; row 0 stops at a token, row 1 at its length."""
    world = build_world(60, NUM_REQS, padding=(2,), seed=seed)
    req = world.rows.idx_mapping.tolist()
    world.stop.max_len.fill_(90)
    world.stop.max_len[req[1]] = world.requests.total_len[req[1]] + 2
    world.stop.stop_token_ids[req[0], :3] = torch.tensor([50, 51, 52])
    world.stop.num_stop_token_ids[req[0]] = 3
    world.stop.num_stop_token_ids[req[3]] = 0
    world.stop.stop_token_ids[req[3], 0] = 7  # beyond those that count
    world.requests.stopped[req[4]] = True
    return world


def rounds() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Row 3 takes the same token twice; row 0 stops in the second round, in its midst."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for n in range(3):
        tokens = torch.randint(0, 40, (NUM_REQS, WIDTH), generator=generator)
        tokens[3] = 7
        num_tokens = torch.randint(1, WIDTH + 1, (NUM_REQS,), generator=generator).int()
        if n == 1:
            tokens[0, 1], num_tokens[0] = 51, 4
        made.append((tokens, num_tokens))
    return made


def run(
    world: World, step_class: type, stop_weight: int, device: str = "cpu"
) -> tuple[World, list[torch.Tensor]]:
    copy = world.clone(device)
    step = copy.bind(step_class)
    copy.rows.stop_weight.fill_(stop_weight)
    step.prepare(copy.rows, NUM_REQS)
    counts = []
    for tokens, num_tokens in rounds():
        count = placed(num_tokens, device).clone()
        step.accept(placed(tokens, device), count, copy.rows, NUM_REQS)
        counts.append(count.cpu())
    return copy.clone(), counts


@pytest.mark.parametrize("stop_weight", [1, 3, 1 << 16])
@pytest.mark.parametrize("seed", range(3))
def test_rounds(implementation: Implementation, seed: int, stop_weight: int) -> None:
    world = build(seed)
    ref, expected = run(world, ReferenceStep, stop_weight)
    out, counts = run(world, implementation.step_class, stop_weight, implementation.device)
    assert_same(ref, out)
    for want, have in zip(expected, counts, strict=True):
        assert_close("num_tokens", ref=want, out=have, rtol=0, atol=0)


def test_what_the_reference_does() -> None:
    """All of a round's tokens are taken, also behind a stop token; then the row rests."""
    world = build(0)
    req = world.rows.idx_mapping.tolist()
    before = world.clone().requests
    out, counts = run(world, ReferenceStep, 1)
    (_, first), (tokens, _), _ = rounds()
    assert [int(count[0]) for count in counts] == [int(first[0]), 4, 0]
    assert [int(count[4]) for count in counts] == [int(count[2]) for count in counts] == [0] * 3
    gained = out.requests.total_len - before.total_len
    assert gained[req[0]] == out.rows.num_sampled[0] == first[0] + 4
    assert gained[req[0]] == (out.requests.num_computed_tokens - before.num_computed_tokens)[req[0]]
    end = int(out.requests.total_len[req[0]])
    assert out.requests.all_token_ids[req[0], end - 4 : end].tolist() == tokens[0].tolist()
    assert out.requests.last_sampled_tokens[req[0], 0] == tokens[0, 3]
    assert out.requests.stopped[req[0]] and out.requests.stopped[req[1]]
    assert not out.requests.stopped[req[3]]
    counted = out.requests.output_bin_counts[req[3], 7] - before.output_bin_counts[req[3], 7]
    assert counted == out.rows.num_sampled[3] == sum(int(n[3]) for _, n in rounds())
    assert out.rows.num_active == out.rows.active[:NUM_REQS].sum() == NUM_REQS - 4


def test_wrong_shapes_are_named(implementation: Implementation) -> None:
    world = build(0).clone(implementation.device)
    step = world.bind(implementation.step_class)
    tokens, num_tokens = (placed(each, implementation.device) for each in rounds()[0])
    for wrong, count, name in (
        (tokens[:-1], num_tokens, "tokens"),
        (tokens, num_tokens[:-1], "num_tokens"),
        (tokens.int(), num_tokens, "tokens"),
        (tokens, num_tokens.long(), "num_tokens"),
    ):
        with pytest.raises(TensorError, match=f"^{name}: "):
            step.accept(wrong, count, world.rows, NUM_REQS)
