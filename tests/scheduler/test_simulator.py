"""FusedStepScheduler against stock's scheduler, turn by turn, with a device that knows its tokens.

The big figure: ``python -m scheduler.simulate`` (see there).
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler.engine import Engine
from scheduler.simulate import LONGEST_WAIT, Comparison, compare
from scheduler.trace import Spec, Trace, expected, make_trace, make_trace_with_drafts
from scheduler.watched import Watched
from scheduler.world import STOCK

from fusedstep import policy
from fusedstep.policy import SLOW_STEP
from fusedstep.vllm_plugin.scheduler.blocks import Blocks
from fusedstep.vllm_plugin.scheduler.in_flight import InFlight
from fusedstep.vllm_plugin.scheduler.rounds import Rounds
from fusedstep.vllm_plugin.scheduler.scheduler import FusedStepScheduler

SETTINGS = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@given(st.randoms(use_true_random=False), st.integers(1, 12))
@SETTINGS
def test_same_answers_as_stock(random: Random, num_requests: int) -> None:
    """Hypothesis finds small traces; what it finds it makes smaller."""
    assert compare(make_trace(random, num_requests)).problems == []


@pytest.mark.parametrize("seed", range(80))
def test_same_answers_as_stock_in_busy_engines(seed: int) -> None:
    assert compare(make_trace(Random(seed), 50)).problems == []


def test_same_answers_where_windows_end_for_a_smaller_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After any number of stops, which other windows may have been scheduled behind."""
    random, numbers = Random(1), set()

    def stops(turn: policy.Turn, num_steps: int) -> int:
        number = random.randint(0, len(turn.remaining))
        numbers.add(number)
        return number

    monkeypatch.setattr(policy, "_stops", stops)
    for seed in range(0, 80, 4):
        assert compare(make_trace(Random(seed), 50)).problems == []
    assert len(numbers) > 4


@pytest.mark.parametrize("looks", [True, False], ids=["ends", "control"])
def test_who_was_to_end_in_a_window_waits_for_none_behind_it(
    looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window ended at its first stop. The next was scheduled for those left after all steps."""
    monkeypatch.setattr(policy, "_stops", lambda *_: 1)
    if not looks:
        monkeypatch.setattr(InFlight, "leaves_out", lambda *_: False)
    specs = tuple(Spec((1, 2), 0, n, ignore_eos=True) for n in (300, 40, 3))
    engine = Engine(
        Trace(specs, max_model_len=400, max_num_batched_tokens=512, lag=2),
        FusedStepScheduler,
        "auto",
    )
    engine.run()
    assert (engine.answers[1].last_at < 60) == looks  # 40 tokens; the others' windows between


def compare_drafts(*seeds: int) -> Comparison:
    total = Comparison()
    for seed in seeds:
        random = Random(seed)
        total += compare(make_trace_with_drafts(random, random.randint(1, 60)))
    return total


@pytest.mark.parametrize("seed", [0, 20, 100030])
def test_rounds_give_stocks_answers_and_drafts(seed: int) -> None:
    """How many drafts hold depends on request and position; vLLM's counts of them are stock's."""
    found = compare_drafts(*range(seed, seed + 20))
    assert found.problems == []
    assert found.counted > 200 and found.summed > 500


def one_round(self: Rounds, request_id: str, num_drafts: int, num_accepted: int) -> Any:
    """The fault: a window is one round of many drafts."""
    return [(num_drafts, num_accepted)]


def nothing(*_: Any, **__: Any) -> None:
    """The fault: what a window that gave way had reserved is kept."""


def to_its_end(self: Blocks, request: Any, num_tokens: int) -> int:
    """The fault: a window reserves nothing beyond a request's end."""
    return needed(self, request, min(num_tokens, request.num_prompt_tokens + request.max_tokens))


needed = Blocks.needed


@pytest.mark.parametrize(
    ("part", "name", "fault", "seeds", "words"),
    [
        (Rounds, "verified", one_round, range(12), "list index out of range"),  # vLLM's counts
        (Rounds, "come_back", nothing, range(12), ""),
        (FusedStepScheduler, "_take_back", nothing, range(12), ""),
        (Blocks, "needed", to_its_end, (100034, 100037), "preempted for a window"),
    ],
)
def test_a_fault_of_rounds_is_found(
    monkeypatch: pytest.MonkeyPatch, part: type, name: str, fault: Any, seeds: Any, words: str
) -> None:
    monkeypatch.setattr(part, name, fault)
    try:
        problems = compare_drafts(*seeds).problems
    except (AssertionError, IndexError) as error:
        problems = [str(error)]
    assert any(words in problem for problem in problems), problems


@pytest.mark.parametrize("seed", range(8))
def test_fixed_at_one_is_stock(seed: int) -> None:
    """Every turn is AsyncScheduler's own."""
    trace = make_trace(Random(seed), 30).with_ids_of_their_own()
    turns: list[list[Any]] = []
    for kind in (FusedStepScheduler, STOCK[True]):
        engine = Engine(replace(trace, asynchronous=True, decode_steps="1", cut=0.0, lag=0), kind)
        engine.device.fused = False
        turns.append(record(engine))
        engine.run()
    assert turns[0] == turns[1] and len(turns[0]) > 30


def record(engine: Engine) -> list[Any]:
    """What ``schedule`` decides, turn by turn."""
    seen: list[Any] = []
    stock = engine.scheduler.schedule

    def schedule(*args: Any) -> Any:
        output = stock(*args)
        new = [(r.req_id, r.block_ids) for r in output.scheduled_new_reqs]
        seen.append((output.num_scheduled_tokens, new, output.preempted_req_ids))
        return output

    engine.scheduler.schedule = schedule
    return seen


def answers(trace: Trace) -> Engine:
    """Ours alone; every answer is the expected one."""
    engine = Engine(trace, Watched, trace.decode_steps)
    engine.run()
    for answer, spec in zip(engine.answers, trace.specs, strict=True):
        if answer.reason != "abort":
            assert (answer.tokens, answer.reason) == expected(spec, trace.max_model_len)
    assert engine.scheduler.faults == []
    return engine


def spec(arrives: int, max_tokens: int, length: int = 5, **fields: Any) -> Spec:
    """A request that runs to its max_tokens."""
    return Spec(tuple(range(length)), arrives, max_tokens, ignore_eos=True, **fields)


LONG = Trace((spec(0, 300),), max_model_len=400, decode_steps="auto")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_arrival_ends_the_windows(asynchronous: bool) -> None:
    """Its first token comes after the step in flight and its own: the queued window gives way."""
    specs = [spec(0, 300), *(spec(at, 20) for at in (30, 91, 150))]
    trace = replace(LONG, specs=tuple(specs), asynchronous=asynchronous)
    engine = answers(trace)
    for answer, each in zip(engine.answers[1:], specs[1:], strict=True):
        assert answer.first_at is not None and answer.first_at - each.arrives <= 2
    assert engine.turns < 60


def test_a_client_that_has_left_ends_no_other_request() -> None:
    """It sends one abort. Its token that would end it comes when another has its id by then."""
    leaves = spec(0, 2, 41, aborted_after=3)
    leaves = replace(leaves, stop_string=expected(leaves, 400)[0][0])
    specs = leaves, spec(3, 15, reuses=0)
    trace = Trace(specs, max_num_batched_tokens=40, lag=1, decode_steps="auto")
    assert compare(trace).problems == []


@pytest.mark.parametrize("by_priority", [False, True])
def test_a_full_house_ends_at_the_first_stop(by_priority: bool) -> None:
    """The stop is in nobody's sight: the place is taken at once all the same."""
    stops = spec(0, 200, 3, min_tokens=20, stop_token_ids=tuple(range(0, 60, 2)))
    at = len(expected(stops, 400)[0])
    assert 20 < at < 40
    trace = replace(
        LONG, specs=(spec(0, 300), stops, spec(1, 10)), max_num_seqs=2, by_priority=by_priority
    )
    engine = answers(trace)
    first = engine.answers[2].first_at
    assert first is not None and first <= at + 5
    assert engine.turns < 40


@pytest.mark.parametrize("step_ms", [0.5, 2.0, 6.0, 40.0, 90.0])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_streams_pause_no_longer_than_told(step_ms: float, asynchronous: bool) -> None:
    specs = tuple(spec(0, 300, streams=n == 1) for n in range(3))
    trace = replace(LONG, specs=specs, step_ms=step_ms, asynchronous=asynchronous)
    engine = answers(trace)
    untimed = 8 if step_ms > 6 else 1
    assert engine.answers[1].longest_pause <= max(untimed, 1 + trace.latency_ms / step_ms)
    longest = (trace.latency_ms / step_ms + 1) / SLOW_STEP
    assert engine.turns <= 20 + 300 / max(1, min(64, int(longest)))


def test_an_abort_ends_windows_only_if_it_helps() -> None:
    """The last running request, or one whose place somebody waits for."""
    lonely = replace(LONG, specs=(spec(0, 300, aborted_after=20),))
    assert answers(lonely).clock.steps <= 23
    others = replace(LONG, specs=(spec(0, 300), spec(0, 300, aborted_after=20)))
    engine = answers(others)
    assert engine.scheduler.door.counter.count == 2  # the arrivals
    waited = replace(others, specs=(*others.specs, spec(1, 5)), max_num_seqs=2)
    first = answers(waited).answers[2].first_at
    assert first is not None and first <= 24


@pytest.mark.parametrize("seed", range(20))
def test_no_preemption_where_stock_can_have_none(seed: int) -> None:
    """The KV cache holds all who run, each at its longest: exactly that much and no more."""
    trace = make_trace(Random(seed), 40)
    each = (1 + trace.sliding_window) * -(-trace.max_model_len // trace.block_size)
    each += 4 * trace.states  # the last token's, that before it, two that windows are to fill
    found = compare(replace(trace, num_blocks=1 + trace.max_num_seqs * each))
    assert found.problems == [] and found.preemptions == found.stock_preemptions == 0


@pytest.mark.parametrize("seed", range(12))
def test_preemptions_are_not_more_than_stocks(seed: int) -> None:
    """A closed batch that does not fit: same admissions, so preemptions can be compared."""
    random = Random(seed)
    specs = tuple(spec(0, random.randint(20, 80), random.randint(1, 15)) for _ in range(6))
    trace = Trace(specs, num_blocks=42, max_num_seqs=6, max_model_len=96, decode_steps="64")
    found = compare(trace)
    assert found.problems == [] and found.stock_preemptions > 0
    assert found.preemptions <= found.stock_preemptions


def test_waiting_for_blocks_that_are_held_ahead() -> None:
    """A window's blocks are given way to the next request as they are used, not after it."""
    trace = Trace((spec(0, 80, 4), spec(3, 5, 60)), num_blocks=26, max_model_len=96)
    stock, ours = Engine(trace, STOCK[True]), answers(trace)
    stock.run()
    first, stock_first = ours.answers[1].first_at, stock.answers[1].first_at
    assert first is not None and stock_first is not None
    assert first - stock_first < LONGEST_WAIT
