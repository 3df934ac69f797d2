"""Structured output: what a grammar forbids, and where a token leads, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ops.grammar_world import NO_BYTES, build_grammar
from ops.options import penalties, set_options, top_p
from ops.world import (
    DTYPES,
    Implementation,
    World,
    assert_close,
    assert_same,
    build_world,
    placed,
    random_logits,
    strided,
)

from fusedstep.errors import TensorError
from fusedstep.ops.reference import ReferenceStep, state_after
from fusedstep.ops.types import FREE, OUTSIDE, PAD_SLOT_ID, REASONS, BatchNeeds, GrammarState


def with_grammar(world: World, grammar: GrammarState) -> World:
    return replace(world, grammar=grammar)


def steps(
    world: World,
    step_class: type,
    logits: list[torch.Tensor],
    needs: BatchNeeds,
    device: str = "cpu",
) -> tuple[World, list[torch.Tensor]]:
    """``prepare`` and a step for each of the logits, on a copy of the world."""
    copy, n = world.clone(device), world.num_reqs
    step = copy.bind(step_class)
    step.prepare(copy.rows, n)
    theirs = [placed(each.clone() if each.is_contiguous() else each, device) for each in logits]
    for each in theirs:
        step.step(each, copy.rows, n, needs)
    return copy.clone(), [each.cpu() for each in theirs]


def compare(
    world: World,
    logits: list[torch.Tensor],
    implementation: Implementation,
    *,
    logprobs: bool = False,
) -> World:
    needs = replace(world.needs(logprobs=logprobs), grammar=True)
    ref, masked = steps(world, ReferenceStep, [each.clone() for each in logits], needs)
    out, theirs = steps(world, implementation.step_class, logits, needs, implementation.device)
    assert_same(ref, out)
    assert ref.grammar is not None and out.grammar is not None
    assert_close("states", ref=ref.grammar.states, out=out.grammar.states, rtol=0, atol=0)
    for expected, got in zip(masked, theirs, strict=True):
        assert_close("logits", ref=expected, out=got, rtol=0, atol=0)
    return ref


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [40, 500])
def test_masks_and_walks(
    implementation: Implementation,
    vocab_size: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows with and without a grammar, padding, and one that is outside before the window."""
    monkeypatch.setattr("fusedstep.ops.triton_step.CONSTRAIN_BLOCK", 128)
    n = 9
    world = build_world(vocab_size, n, padding=(3,), block_sizes=(16, 32), seed=vocab_size)
    grammar = build_grammar(n + 3, vocab_size, seed=vocab_size)
    rows = world.rows.idx_mapping[:n]
    grammar.states[rows[0]] = FREE
    grammar.states[rows[5]] = OUTSIDE
    world.requests.stopped[rows[5]] = True
    for row, options in ((1, (penalties,)), (2, (top_p,))):
        set_options(world, row, options, random_logits(n, vocab_size))
    logits = [random_logits(n, vocab_size, seed=i).to(dtype) for i in range(4)]
    after = compare(with_grammar(world, grammar), logits, implementation)
    assert after.grammar is not None
    ends = after.grammar.states[rows[rows >= 0]]
    assert (ends == OUTSIDE).sum() > 1  # some got there in the window
    assert (ends == FREE).sum() > 1


def test_a_strided_row_and_logprobs(implementation: Implementation) -> None:
    """Nothing is written beside the rows; logprobs are those of the masked logits, as stock's."""
    world = with_grammar(build_world(130, 5, seed=4), build_grammar(8, 130, seed=4))
    logits = strided(random_logits(5, 130), 147, 3)
    compare(world, [logits], implementation, logprobs=True)


def test_reasoning_ends_with_its_token(implementation: Implementation) -> None:
    """Until then any token may come; the end token itself is none of the grammar's."""
    n, vocab_size, end = 4, 60, 17
    world = with_grammar(build_world(vocab_size, n), build_grammar(n + 3, vocab_size))
    grammar = world.grammar
    assert grammar is not None
    rows = world.rows.idx_mapping[:n]
    grammar.states[rows] = REASONS - 7
    grammar.reasoning_ends[rows[:2], 0] = end
    grammar.reasoning_ends[rows[2], 1] = end
    logits = [random_logits(n, vocab_size, seed=i) for i in range(3)]
    world.sampling.temperature.zero_()
    logits[0][:, end] = 100.0
    after = compare(world, logits[:1], implementation)
    assert after.grammar is not None
    assert after.grammar.states[rows].tolist() == [7, 7, OUTSIDE, REASONS - 7]
    assert after.rows.out_tokens[0, :n].tolist() == [end] * n
    compare(world, logits, implementation)


def test_a_token_without_bytes_ends_the_grammar(implementation: Implementation) -> None:
    world = with_grammar(build_world(60, 2), build_grammar(5, 60))
    assert world.grammar is not None
    rows = world.rows.idx_mapping[:2]
    world.grammar.mask_ids.zero_()  # nothing is forbidden
    logits = random_logits(2, 60)
    world.sampling.temperature.zero_()
    logits[:, NO_BYTES] = 100.0
    after = compare(world, [logits], implementation)
    assert after.grammar is not None
    assert after.grammar.states[rows].tolist() == [FREE, FREE]


def test_a_row_outside_writes_nowhere(implementation: Implementation) -> None:
    """It has its token, then the window goes on without it, and so do later ones."""
    world = with_grammar(build_world(60, 3, block_sizes=(16, 32)), build_grammar(6, 60))
    grammar = world.grammar
    assert grammar is not None
    grammar.mask_ids.zero_()
    grammar.next_states.fill_(OUTSIDE)
    rows = world.rows.idx_mapping[:3]
    grammar.states[rows[1]] = FREE
    world.sampling.temperature.zero_()
    after = compare(world, [random_logits(3, 60, seed=i) for i in range(2)], implementation)
    assert after.rows.num_sampled[:3].tolist() == [1, 2, 1]
    assert after.rows.active[:3].tolist() == [False, True, False]
    assert int(after.rows.num_active) == 1
    assert after.requests.stopped[rows].tolist() == [True, False, True]
    assert (after.inputs.slot_mappings[:, [0, 2]] == PAD_SLOT_ID).all()


def test_sample_leaves_the_grammar_where_it_is(implementation: Implementation) -> None:
    """A stock step samples under the mask; ``follow`` comes when its token is known to count."""
    n, vocab_size = 4, 60
    world = with_grammar(build_world(vocab_size, n), build_grammar(n + 3, vocab_size))
    needs = replace(world.needs(), grammar=True)
    ends: list[list[int]] = []
    for step_class, device in (
        (ReferenceStep, "cpu"),
        (implementation.step_class, implementation.device),
    ):
        copy = world.clone(device)
        assert copy.grammar is not None
        step = copy.bind(step_class)
        step.prepare(copy.rows, n)
        before = copy.grammar.states.clone()
        step.sample(placed(random_logits(n, vocab_size), device), copy.rows, n, needs)
        assert torch.equal(copy.grammar.states, before)
        copy.rows.sampled[1] = -1  # a prefill that is not finished
        step.follow(copy.rows, n)
        assert copy.rows.active[:n].all()
        row = int(copy.rows.idx_mapping[1])
        assert copy.grammar.states[row] == before[row]
        ends.append(copy.grammar.states.tolist())
    assert ends[0] == ends[1]
    assert ends[0] != before.tolist()


def test_without_its_mask_a_row_samples_something_else() -> None:
    """The control of the tests above: what they compare depends on the masks and on the walks."""
    world = with_grammar(build_world(60, 4), build_grammar(7, 60))
    logits = [random_logits(4, 60, seed=i) for i in range(3)]
    tokens = []
    for grammar in (True, False):
        needs = replace(world.needs(), grammar=grammar)
        after, _ = steps(world, ReferenceStep, [each.clone() for each in logits], needs)
        tokens.append(after.rows.out_tokens[:3, :4].tolist())
    assert tokens[0] != tokens[1]


def test_a_walk_ends_where_a_byte_leads_nowhere() -> None:
    """Whatever bytes are left: the token is a stop token with text."""
    grammar = build_grammar(1, 8)
    grammar.next_states.fill_(FREE)
    grammar.token_starts[:] = torch.arange(9, dtype=torch.int32) * 3
    grammar.states[0] = 4
    assert state_after(0, 0, grammar) == FREE


def test_tables_that_do_not_fit_are_named(implementation: Implementation) -> None:
    grammar = build_grammar(5, 60)
    world = with_grammar(build_world(60, 2), replace(grammar, masks=grammar.masks[:, :1].clone()))
    with pytest.raises(TensorError, match="masks: shape"):
        world.clone(implementation.device).bind(implementation.step_class)
