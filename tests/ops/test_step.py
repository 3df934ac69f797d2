"""The token of every row, and all else a step writes, against the plain-torch truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ops.options import (
    COMBINATIONS,
    OPTIONS,
    Option,
    bad_words,
    greedy,
    min_p,
    min_tokens_reached,
    name_of,
    neutral,
    penalties,
    set_all_options,
    set_options,
    small_top_p,
    top_k,
    top_k_most,
    top_p,
    warm,
)
from ops.world import (
    DTYPES,
    POISON,
    Implementation,
    World,
    build_world,
    compare,
    random_logits,
    run,
)

from fusedstep.ops.reference import ReferenceStep
from fusedstep.ops.types import BatchNeeds


def mixed_world(vocab_size: int, logits: torch.Tensor, **world_options: Any) -> World:
    """Row i has the i-th combination of options, and so on from the first."""
    world = build_world(vocab_size, len(logits), **world_options)
    for batch_idx in range(len(logits)):
        set_options(world, batch_idx, COMBINATIONS[batch_idx % len(COMBINATIONS)], logits)
    return world


SIZES = [(1, torch.float32), (63, torch.float16), *((1000, dtype) for dtype in DTYPES)]


@pytest.mark.parametrize(("vocab_size", "dtype"), SIZES, ids=str)
def test_mixed_batch(implementation: Implementation, vocab_size: int, dtype: torch.dtype) -> None:
    """Every combination in one batch, between padding rows; with logprobs and ranks."""
    n = len(COMBINATIONS) + 3
    logits = random_logits(n, vocab_size, seed=vocab_size)
    world = mixed_world(vocab_size, logits, padding=(2, 17, n - 1))
    tokens = compare(world, logits.to(dtype), implementation, needs=world.needs(logprobs=True))
    assert [i for i, token in enumerate(tokens) if token == POISON] == [2, 17, n - 1]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("scale", [0.5, 30.0])
def test_shuffled_mixed_batch(implementation: Implementation, scale: float, seed: int) -> None:
    """Other neighbours, peaked and flat logits, and options of two combinations in one row."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(COMBINATIONS), generator=generator).tolist()
    n = 12 if implementation.interpreted else len(order)
    logits = random_logits(n, 200, seed=seed, scale=scale)
    world = build_world(200, n, seed=seed)
    for batch_idx in range(n):
        options = {*COMBINATIONS[order[batch_idx]], *COMBINATIONS[order[batch_idx - 1]]}
        set_options(world, batch_idx, sorted(options, key=OPTIONS.index), logits)
    compare(world, logits.bfloat16(), implementation)


@pytest.mark.parametrize("options", COMBINATIONS, ids=name_of)
def test_same_options_in_every_row(
    implementation: Implementation, options: tuple[Option, ...]
) -> None:
    """So that a batch in which nothing is truncated is launched as such."""
    seed = COMBINATIONS.index(options)
    logits = random_logits(2, 333, seed=seed)
    world = build_world(333, 2, seed=seed)
    set_all_options(world, options, logits)
    compare(world, logits.to(DTYPES[seed % 3]), implementation)


@pytest.mark.parametrize("logprobs", [False, True], ids=["tokens", "logprobs"])
def test_sample_alone(implementation: Implementation, logprobs: bool) -> None:
    """``sample`` writes the tokens and leaves the requests where they are."""
    logits = random_logits(len(COMBINATIONS), 63)
    world = mixed_world(63, logits)
    needs = world.needs(logprobs=logprobs)
    compare(world, logits.bfloat16(), implementation, call="sample", needs=needs)


@pytest.mark.parametrize(("num_reqs", "vocab_size"), [(0, 63), (1, 1000), (7, 63), (64, 1000)])
def test_batch_sizes(implementation: Implementation, num_reqs: int, vocab_size: int) -> None:
    logits = random_logits(num_reqs, vocab_size, scale=3.0)
    world = mixed_world(vocab_size, logits)
    compare(world, logits.bfloat16(), implementation)


@pytest.mark.parametrize("options", COMBINATIONS, ids=name_of)
def test_same_options_in_a_large_batch(
    compiled: Implementation, options: tuple[Option, ...]
) -> None:
    seed = COMBINATIONS.index(options)
    logits = random_logits(64, 1000, seed=seed)
    world = build_world(1000, 64)
    set_all_options(world, options, logits)
    compare(world, logits.to(DTYPES[seed % 3]), compiled)


@pytest.mark.parametrize("options", COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("vocab_size", [49152, 151936])
def test_full_vocabulary(
    compiled: Implementation, options: tuple[Option, ...], vocab_size: int
) -> None:
    logits = random_logits(2, vocab_size, seed=3, scale=3.0).bfloat16()
    world = build_world(vocab_size, 2)
    set_all_options(world, options, logits)
    compare(world, logits, compiled)


def test_mixed_batch_of_a_full_vocabulary(implementation: Implementation) -> None:
    vocab_size = 151936
    rows = [(greedy,), (top_p, penalties), (warm, top_k, top_p, bad_words)]
    logits = random_logits(3, vocab_size, seed=3, scale=3.0).bfloat16()
    world = build_world(vocab_size, 3)
    for batch_idx, options in enumerate(rows):
        set_options(world, batch_idx, options, logits)
    compare(world, logits, implementation, needs=world.needs(logprobs=True))


@pytest.mark.parametrize("need", ["adjustment", "min_p", "truncation", "logprobs"])
def test_needs_may_be_more_than_a_batch_uses(implementation: Implementation, need: str) -> None:
    """They say what a row may have, not what one has."""
    logits = random_logits(6, 1000)
    world = build_world(1000, 6)
    for batch_idx, option in enumerate([greedy, neutral, warm, neutral, greedy, warm]):
        set_options(world, batch_idx, [option], logits)
    none = BatchNeeds(adjustment=False, min_p=False, truncation=False, logprobs=False)
    assert world.needs() == none
    tokens = compare(world, logits, implementation, needs=none)
    assert compare(world, logits, implementation, needs=replace(none, **{need: True})) == tokens


def test_greedy_rows_need_no_truncation(implementation: Implementation) -> None:
    """A greedy row's top-k, top-p and min-p are no needs of the batch."""
    logits = random_logits(2, 63)
    world = build_world(63, 2)
    set_all_options(world, (greedy, top_k, small_top_p, min_p), logits)
    assert not world.needs().truncation and not world.needs().min_p
    assert compare(world, logits, implementation) == logits.argmax(-1).tolist()


WITHOUT_EFFECT = (neutral, top_k_most, min_tokens_reached)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in WITHOUT_EFFECT])
def test_every_option_changes_tokens(option: Option) -> None:
    """The options above do something: the truth itself differs with and without each."""
    logits = random_logits(48, 1000, scale=2.0)
    world = build_world(1000, 48)
    before = run(world, ReferenceStep, logits).rows.sampled
    set_all_options(world, [option], logits)
    assert not torch.equal(run(world, ReferenceStep, logits).rows.sampled, before)
