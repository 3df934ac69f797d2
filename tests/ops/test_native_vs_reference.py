"""The native step operations against their plain-torch truth, and against vLLM's stop rule."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedstep.ops import native, native_sample, reference
from fusedstep.ops.native import NativeStep
from fusedstep.ops.reference import ReferenceStep
from fusedstep.ops.types import PAD_SLOT_ID

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def greedy(s: Any) -> None:
    s.temperature.zero_()


def neutral(s: Any) -> None:
    pass


def cold(s: Any) -> None:
    s.temperature.fill_(1e-6)


def hot(s: Any) -> None:
    s.temperature.fill_(1e4)


def warm(s: Any) -> None:
    s.temperature.fill_(0.7)


def top_k(s: Any) -> None:
    s.top_k.clamp_(max=5)


def top_k_1(s: Any) -> None:
    s.top_k.fill_(1)


def top_p(s: Any) -> None:
    s.top_p.fill_(0.9503)


def small_top_p(s: Any) -> None:
    s.top_p.fill_(0.1003)


def tiny_top_p(s: Any) -> None:
    s.top_p.fill_(1e-6)


def min_p(s: Any) -> None:
    s.min_p.fill_(0.05)


def penalties(s: Any) -> None:
    s.repetition_penalty.fill_(1.3)
    s.frequency_penalty.fill_(0.7)
    s.presence_penalty.fill_(-0.4)


def repetition(s: Any) -> None:
    s.repetition_penalty.fill_(0.6)


def frequency(s: Any) -> None:
    s.frequency_penalty.fill_(1.5)


def allowed(s: Any) -> None:
    size = min(7, int(s.top_k.max()))
    s.num_allowed_token_ids.fill_(size)
    s.allowed_token_ids[:, :size] = torch.arange(size).flip(0).int()


def logit_bias(s: Any) -> None:
    size = min(3, int(s.top_k.max()))
    s.num_logit_bias.fill_(size)
    s.logit_bias_token_ids[:, :size] = torch.arange(size).int()
    s.logit_bias[:, :size] = torch.tensor([4.5, -100.0, 3.25])[:size]


def min_tokens(s: Any) -> None:
    s.min_lens[::2] = 50
    s.num_min_stop_token_ids.fill_(2)
    s.min_stop_token_ids[:, 0] = 0
    s.min_stop_token_ids[:, 1] = int(s.top_k.max()) - 1


def bad_words(s: Any) -> None:
    """A word of one token, one of two, and one longer than any output."""
    s.num_bad_words.fill_(3)
    s.bad_word_offsets[:, :4] = torch.tensor([0, 1, 3, 90]).int()


OPTIONS: list[Callable[[Any], None]] = [
    greedy,
    neutral,
    cold,
    hot,
    warm,
    top_k,
    top_k_1,
    top_p,
    small_top_p,
    tiny_top_p,
    min_p,
    penalties,
    repetition,
    frequency,
    allowed,
    logit_bias,
    min_tokens,
    bad_words,
]
COMBINATIONS = [
    (option,) for option in OPTIONS
] + [
    (greedy, penalties, logit_bias, min_tokens, bad_words),
    (greedy, allowed, penalties),
    (warm, top_k, top_p),
    (warm, min_p, top_k, top_p, penalties),
    (hot, top_k, small_top_p, bad_words, logit_bias),
    (warm, allowed, top_p, penalties, min_tokens),
    tuple(o for o in OPTIONS if o not in (greedy, neutral, cold, hot, allowed)),
]  # fmt: skip


def name_of(options: tuple[Callable[[Any], None], ...]) -> str:
    return "+".join(option.__name__ for option in options)


def sample_both(world: Any, logits: torch.Tensor) -> tuple[list[int], list[int]]:
    tokens = []
    for step_class in (ReferenceStep, NativeStep):
        copy = world.clone()
        step = copy.bind(step_class)
        step.prepare(copy.rows, copy.num_reqs)
        before = logits.clone()
        step.sample(logits, copy.rows, copy.num_reqs)
        assert torch.equal(before.nan_to_num(), logits.nan_to_num()), "logits were changed"
        tokens.append(copy.rows.sampled.tolist())
    return tokens[0], tokens[1]


@pytest.mark.parametrize("options", COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("vocab_size", [1, 63, 1000])
def test_tokens(make_world: Any, options: Any, vocab_size: int) -> None:
    world = make_world(vocab_size, 7, max_num_reqs=9)
    for option in options:
        option(world.sampling)
    end = world.requests.total_len.long()[:, None] - 1
    world.sampling.bad_word_token_ids[:, 1:2] = world.requests.all_token_ids.gather(1, end)
    world.sampling.bad_word_token_ids[:, 2] = vocab_size // 2
    for seed, dtype in enumerate(DTYPES):
        logits = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4
        ref, out = sample_both(world, logits.to(dtype))
        assert out == ref


@pytest.mark.parametrize("options", [(greedy,), (neutral,), (warm, top_k, top_p)], ids=name_of)
@pytest.mark.parametrize("num_reqs", [0, 1, 64])
def test_batch_sizes(make_world: Any, options: Any, num_reqs: int) -> None:
    world = make_world(1000, num_reqs)
    for option in options:
        option(world.sampling)
    ref, out = sample_both(world, torch.randn(num_reqs, 1000).bfloat16() * 3)
    assert out == ref


@pytest.mark.parametrize("options", COMBINATIONS, ids=name_of)
def test_full_vocabulary(make_world: Any, options: Any) -> None:
    world = make_world(49152, 2, max_num_reqs=2)
    for option in options:
        option(world.sampling)
    logits = torch.randn(2, 49152, generator=torch.Generator().manual_seed(3)) * 3
    ref, out = sample_both(world, logits.bfloat16())
    assert out == ref


def has_a_token(options: Any, fill: float) -> bool:
    """Is a token defined? Not where options meet inf - inf, nor for the softmax of inf."""
    if abs(fill) == torch.inf and len(options) > 1:
        return False
    return fill != torch.inf or options[0] not in (top_p, small_top_p, tiny_top_p, min_p)


FLAT_ROWS = [
    pytest.param(fill, options, id=f"{name_of(options)}-{fill:g}")
    for fill in (-torch.inf, 0.0, -0.0, 1.0, torch.inf)
    for options in COMBINATIONS
    if has_a_token(options, fill)
]


@pytest.mark.parametrize(("fill", "options"), FLAT_ROWS)
def test_flat_rows(make_world: Any, options: Any, fill: float) -> None:
    """All-equal logits; all -inf gives token 0 wherever nothing is added."""
    world = make_world(1000, 4)
    for option in options:
        option(world.sampling)
    ref, out = sample_both(world, torch.full((4, 1000), fill))
    assert out == ref


def test_rows_with_one_finite_logit(make_world: Any) -> None:
    for option in OPTIONS:
        if option in (allowed, bad_words, min_tokens):
            continue
        world = make_world(1000, 3)
        option(world.sampling)
        logits = torch.full((3, 1000), -torch.inf)
        logits[:, 700] = -5.0
        ref, out = sample_both(world, logits)
        assert out == ref == [700] * 3


def test_every_option_changes_the_scores(make_world: Any) -> None:
    """The options above do something: the truth itself differs with and without each."""
    for option in (penalties, repetition, frequency, allowed, logit_bias, min_tokens, bad_words):
        world = make_world(1000, 1)
        req = int(world.rows.idx_mapping[0])
        option(world.sampling)
        world.sampling.min_lens.fill_(50)
        world.sampling.bad_word_token_ids[:, 1] = world.requests.last_sampled_tokens[:, 0]
        world.sampling.bad_word_token_ids[:, 2] = 500
        logits = torch.randn(1000)
        out = reference.apply_bias(logits.clone(), req, 10, world.sampling)
        out = reference.apply_penalties(out, req, world.requests, world.sampling)
        out = reference.apply_bad_words(out, req, world.requests, world.sampling)
        assert not torch.equal(out, logits), option.__name__
        if option is bad_words:
            assert out.isinf().nonzero().flatten().tolist() == [0, 500]


def test_positive_and_negative_zero_are_equal(make_world: Any) -> None:
    world = make_world(63, 1)
    greedy(world.sampling)
    logits = torch.full((1, 63), -1.0)
    logits[0, 10], logits[0, 20] = -0.0, 0.0
    assert sample_both(world, logits) == ([10], [10])


def test_nan_logits_give_some_token(make_world: Any) -> None:
    for option in OPTIONS:
        world = make_world(1000, 2)
        option(world.sampling)
        step = world.bind(NativeStep)
        step.prepare(world.rows, 2)
        step.sample(torch.full((2, 1000), torch.nan), world.rows, 2)
        assert all(0 <= token < 1000 for token in world.rows.sampled.tolist())


def test_strided_logits_and_inactive_rows(make_world: Any) -> None:
    world = make_world(63, 4)
    world.rows.budget[1] = 0
    world.requests.stopped[world.rows.idx_mapping[2]] = True
    wide = torch.randn(4, 100).half()
    ref, out = sample_both(world, wide[:, :63])
    assert out == ref
    assert out[1:3] == [-77, -77] and -77 not in (out[0], out[3])


def test_noise_is_bit_equal_and_bounded() -> None:
    tokens = torch.arange(20000)
    for seed, position in [(0, 0), (-1, 5), (2**63 - 1, 2**20), (1234567890123456789, 77)]:
        ref = reference.gumbel_noise(seed, position, tokens)
        prefix = native_sample.hash_prefix(seed, position)
        out = torch.tensor([native_sample.gumbel_noise(prefix, t) for t in range(len(tokens))])
        assert torch.equal(out.float(), ref)
        bounds = torch.empty(len(tokens))
        row = torch.zeros(len(tokens)).numpy()
        native_sample._bound_scores(row, 0, prefix, bounds.numpy())
        assert (bounds > ref).all()
        assert (bounds - ref)[ref > 4].max() < 0.1, "a loose bound makes sampling slow"


def test_sampler_follows_the_softmax(make_world: Any) -> None:
    """Chi-square of 20000 draws over 10 tokens: 9 degrees of freedom, p = 0.0001 at 33.7."""
    world = make_world(10, 1, max_num_reqs=1)
    step = world.bind(NativeStep)
    logits = torch.linspace(-1.5, 1.5, 10)[None]
    step.prepare(world.rows, 1)
    counts = torch.zeros(10)
    for draw in range(20000):
        world.inputs.positions[0] = draw
        step.sample(logits, world.rows, 1)
        counts[world.rows.sampled[0]] += 1
    expected = logits[0].softmax(-1) * 20000
    assert ((counts - expected) ** 2 / expected).sum() < 33.7


@pytest.mark.parametrize("block_sizes", [(), (16,), (16, 5)], ids=str)
def test_fifty_steps(make_world: Any, same: Any, block_sizes: tuple[int, ...]) -> None:
    """Windows of 8 steps with budgets, stops and refills, all state equal after each call."""
    ref = make_world(63, 7, max_num_reqs=9, block_sizes=block_sizes)
    for option in (warm, penalties, top_p, bad_words, min_tokens):
        option(ref.sampling)
    ref.sampling.temperature[3:5] = 0
    ref.stop.num_stop_token_ids[::2] = 2
    ref.stop.stop_token_ids[:, :2] = torch.tensor([5, 9]).int()
    ref.stop.max_len[:] = torch.arange(40, 40 + 9 * 5, 5).int()
    out = ref.clone()
    steps = ref.bind(ReferenceStep), out.bind(NativeStep)
    generator = torch.Generator().manual_seed(1)
    for _window in range(7):
        budget = torch.randint(0, 9, (7,), generator=generator).int()
        for world in (ref, out):
            world.rows.budget.copy_(budget)
        active = [
            step.prepare(world.rows, 7) for step, world in zip(steps, (ref, out), strict=True)
        ]
        assert active[0] == active[1]
        same(ref, out)
        for step_idx in range(8):
            logits = torch.randn(7, 63, generator=generator).bfloat16() * 2
            for step, world in zip(steps, (ref, out), strict=True):
                step.sample(logits, world.rows, 7)
                active.append(step.advance(world.rows, 7, step_idx))
            assert active[-1] == active[-2]
            same(ref, out)
    assert ref.requests.stopped.any(), "the test should see rows stop"


def test_inactive_rows_have_no_slot(make_world: Any) -> None:
    world = make_world(63, 3, block_sizes=(16, 8))
    world.rows.budget[:] = torch.tensor([1, 0, 2]).int()
    step = world.bind(NativeStep)
    assert step.prepare(world.rows, 3) == 2
    slots = world.inputs.slot_mappings
    assert (slots[:, 1] == PAD_SLOT_ID).all() and (slots[:, 3:] == PAD_SLOT_ID).all()
    assert (slots[:, [0, 2]] >= 0).all()
    assert (world.inputs.seq_lens[3:] == 0).all()
    positions = world.inputs.positions[:3].clone()
    step.sample(torch.randn(3, 63), world.rows, 3)
    assert step.advance(world.rows, 3, 0) == 1
    assert (slots[:, :2] == PAD_SLOT_ID).all()
    assert world.inputs.positions[:3].tolist() == (positions + torch.tensor([0, 0, 1])).tolist()


@settings(max_examples=200, deadline=None)
@given(
    token=st.integers(0, 9),
    num_output=st.integers(1, 6),
    max_tokens=st.integers(1, 6),
    max_model_len=st.integers(5, 12),
    eos=st.none() | st.integers(0, 9),
    stop_ids=st.lists(st.integers(0, 9), max_size=3),
)
def test_stop_rule_is_check_stop(
    token: int,
    num_output: int,
    max_tokens: int,
    max_model_len: int,
    eos: int | None,
    stop_ids: list[int],
) -> None:
    """The row stops exactly when vLLM's scheduler would stop the request."""
    from vllm.v1.core.sched.utils import check_stop

    prompt_len = 4
    request = SimpleNamespace(
        pooling_params=None,
        sampling_params=SimpleNamespace(
            eos_token_id=eos, stop_token_ids=stop_ids, min_tokens=0, repetition_detection=None
        ),
        output_token_ids=[token] * num_output,
        num_tokens=prompt_len + num_output,
        num_output_tokens=num_output,
        max_tokens=max_tokens,
    )
    step, rows = native._smallest_step(10, 0)
    all_stop_ids = stop_ids + ([] if eos is None else [eos])
    step._requests.total_len[0] = prompt_len + num_output - 1
    stop = native.StopStateViews(
        max_len=torch.tensor([min(prompt_len + max_tokens, max_model_len)]).int().numpy(),
        num_stop_token_ids=torch.tensor([len(all_stop_ids)]).int().numpy(),
        stop_token_ids=torch.tensor([[*all_stop_ids, -1]]).int().numpy(),
    )
    requests = step._requests._replace(all_token_ids=torch.zeros(1, 20).int().numpy())
    step._stop, step._requests = stop, requests
    step.prepare(rows, 1)
    rows.sampled[0] = token
    step.advance(rows, 1, 0)
    assert bool(step._requests.stopped[0]) == check_stop(request, max_model_len)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_logprobs(dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 1003) * 5).to(dtype)[:, :1000]
    logits[0, :100] = logits[0, 100]
    token_ids = torch.randint(0, 1000, (5, 4))
    token_ids[0, 0] = 100
    ref_logprobs, ref_ranks = reference.token_logprobs(logits, token_ids)
    logprobs, ranks = native.token_logprobs(logits, token_ids)
    torch.testing.assert_close(logprobs, ref_logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(ranks, ref_ranks)
    assert logprobs.dtype == torch.float32 and ranks.dtype == torch.int64
