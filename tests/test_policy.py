"""The policy is a pure function: every limit, and what it says about itself."""

from dataclasses import replace

import pytest

from fusedstep.errors import ConfigError
from fusedstep.policy import (
    MAX_STEPS,
    MAX_STEPS_HOST_STOPS,
    MAX_STEPS_UNTIMED,
    Decision,
    DecodeSteps,
    StepTimes,
    Turn,
    decide,
)

AUTO = DecodeSteps()


def turn(*remaining: int, **fields: object) -> Turn:
    return Turn(remaining, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["auto", "AUTO", 1, "7", MAX_STEPS])
def test_parse(value):
    assert str(DecodeSteps.parse(value)) == str(value).lower()


@pytest.mark.parametrize("value", [0, -1, MAX_STEPS + 1, "", "many", 2.5, None])
def test_parse_refuses_in_one_line(value):
    with pytest.raises(ConfigError, match="from 1 to 64") as error:
        DecodeSteps.parse(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "seen", "num_steps", "reason"),
    [
        (AUTO, turn(1000, 5), MAX_STEPS, "longest window"),
        (AUTO, turn(3, 5), 5, "longest-remaining request"),
        (DecodeSteps(7), turn(1000), 7, "fixed"),
        (DecodeSteps(7), turn(2), 2, "longest-remaining request"),
        (DecodeSteps(1), turn(1000), 1, "fixed at 1"),
        (AUTO, turn(1000, prefill_in_flight=True), 1, "prefill"),
        (AUTO, turn(1000, may_admit=True), 1, "a waiting request may be admitted"),
        (DecodeSteps(7), turn(1000, may_admit=True), 1, "a waiting request may be admitted"),
        (AUTO, turn(1000, stock_reason="structured output"), 1, "structured output"),
        (AUTO, turn(1000, logprobs=64 * 6), 64, "longest window"),
        (AUTO, turn(1000, logprobs=8 * 49153), 10, "room for logprobs"),
        (DecodeSteps(16), turn(1000, logprobs=8 * 49153), 10, "room for logprobs"),
        (AUTO, turn(1000, logprobs=64 * 152000), 1, "room for logprobs"),
        (AUTO, turn(), 1, "nothing decodes"),
        (AUTO, turn(1000, host_stops=True), MAX_STEPS_HOST_STOPS, "a request has stop strings"),
        (DecodeSteps(32), turn(1000, host_stops=True), 32, "fixed"),
        (AUTO, turn(1000, 1000, token_budget=20), 10, "token budget"),
        (AUTO, turn(1000, 1000, token_budget=1), 1, "token budget"),
        (AUTO, turn(1000, tokens_ahead=40), 10, "blocks held ahead are used first"),
        (AUTO, turn(1000, tokens_ahead=3), 1, "blocks held ahead are used first"),
        (AUTO, turn(1000, tokens_ahead=0), 1, "a waiting request may be admitted"),
        (DecodeSteps(7), turn(1000, tokens_ahead=8), 2, "blocks held ahead are used first"),
    ],
)
def test_limits(config, seen, num_steps, reason):
    decision = decide(config, seen)
    assert (decision.num_steps, decision.reason) == (num_steps, reason)


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ({"streams": True}, "a request streams"),
        ({"joins_anytime": True}, "a waiting request may get ready"),
        ({"stoppable": False}, "the window cannot be ended"),
    ],
)
@pytest.mark.parametrize(
    ("latency_ms", "step_ms", "measured", "num_steps"),
    [
        (50.0, 5.0, True, 9),
        (50.0, 28.0, True, 2),
        (50.0, 49.0, True, 1),
        (50.0, 80.0, True, 1),
        (50.0, None, False, MAX_STEPS_UNTIMED),
        (50.0, 1.0, False, MAX_STEPS_UNTIMED),  # measured at other batch sizes only
        (50.0, 25.0, False, 2),
        (120.0, 2.0, True, 50),
    ],
)
def test_nobody_waits_longer_than_told(who, reason, latency_ms, step_ms, measured, num_steps):
    seen = turn(1000, latency_ms=latency_ms, step_ms=step_ms, step_measured=measured, **who)
    decision = decide(AUTO, seen)
    assert decision.num_steps == num_steps
    assert step_ms is None or num_steps == 1 or num_steps * step_ms * 1.2 <= latency_ms + step_ms
    assert decision.reason == reason
    assert decide(DecodeSteps(32), seen).num_steps == 32


@pytest.mark.parametrize("step_ms", [0.0, 0.01, 0.7])
def test_short_steps_leave_the_longest_window(step_ms):
    assert decide(AUTO, turn(1000, streams=True, step_ms=step_ms)).num_steps == MAX_STEPS


def test_nobody_waits():
    assert decide(AUTO, turn(1000, step_ms=900.0)).num_steps == MAX_STEPS


def test_a_full_house_ends_at_the_first_stop():
    assert decide(AUTO, turn(90, 3, full_house=True)) == Decision(64, "longest window", 1)
    assert decide(DecodeSteps(7), turn(90, full_house=True)) == Decision(7, "fixed", 1)
    assert not decide(AUTO, turn(90, 3)).num_stops
    assert not decide(AUTO, turn(90, full_house=True, may_admit=True)).num_stops


@pytest.mark.parametrize(
    ("rows", "row_ms", "stops"),
    [
        (64, 0.0, 0),  # not known
        (64, 1.0, 3),  # a large model on a CPU: 64 row-milliseconds a step
        (64, 0.01, 32),
        (64, 0.005, 0),  # a GPU: a row costs nothing
        (8, 1.0, 1),
        (1, 9.0, 1),
    ],
)
def test_a_window_ends_where_a_smaller_batch_is_faster(rows, row_ms, stops):
    """Of 64 rows that stop within 128 steps 3 have cost 9 ms when they end the window for 10."""
    seen = turn(*[1000] * rows, row_ms=row_ms)
    assert decide(AUTO, seen) == Decision(64, "longest window", stops)
    assert decide(AUTO, replace(seen, full_house=True)).num_stops == 1
    assert decide(DecodeSteps(1), seen).num_stops == 0


def test_what_a_row_adds_to_a_step():
    times = StepTimes()
    times.add(64, 1, 80.0)
    assert times.row_ms(64) == times.row_ms(40) == 0.0
    times.add(40, 1, 48.0)  # 32 to 63 rows, 64 to 127: 48 apart
    assert times.row_ms(64) == pytest.approx(32 / 48)
    assert times.row_ms(40) == 0.0
    times.add(3, 1, 12.0)
    assert times.row_ms(40) == pytest.approx(36 / 45)
    times.add(100, 1, 1.0)  # faster than a smaller batch: noise
    for _ in range(30):
        times.add(100, 1, 1.0)
    assert times.row_ms(64) == 0.0


@pytest.mark.parametrize("wanted", [1, 2, 3, 37, MAX_STEPS])
def test_blocks_leave_half_of_what_is_free(wanted):
    """Requests at places 12 and 3 of 16-token blocks: the longest window that fits is taken."""

    def blocks_for(num_steps: int) -> int:
        return (num_steps + 11) // 16 + (num_steps + 2) // 16

    for free in range(24):
        seen = turn(wanted, wanted, free_blocks=free, blocks_for=blocks_for)
        decision = decide(AUTO, seen)
        fitting = [k for k in range(1, wanted + 1) if blocks_for(k) <= free // 2]
        assert decision.num_steps == max(fitting, default=1)
        assert (decision.reason == "free KV-cache blocks") == (decision.num_steps < wanted)


def test_step_times():
    times = StepTimes()
    assert times.get(1) == (None, False)
    times.add(5, 10, 20.0)
    assert times.get(4) == times.get(7) == (2.0, True)
    assert times.get(8) == times.get(3) == (2.0, False)
    times.add(64, 1, 9.0)
    assert times.get(8) == (9.0, False)  # the longest, until it is measured
    times.add(5, 1, 4000.0)  # a compilation: doubles at most
    assert times.get(5) == (2.5, True)
    for _ in range(30):
        times.add(6, 8, 8.0)
    assert times.get(6)[0] == pytest.approx(1.0, abs=0.01)
    for _ in range(30):
        times.add(6, 8, 80.0)
    assert times.get(6)[0] == pytest.approx(10.0, abs=0.1)


@pytest.mark.parametrize(
    ("config", "seen", "num_steps", "reason"),
    [
        (DecodeSteps(64), turn(99, tokens_per_step=4), 16, "fixed"),
        (AUTO, turn(99, tokens_per_step=4), 16, "longest window"),
        (AUTO, turn(2, 5, tokens_per_step=4), 5, "longest-remaining request"),  # in rounds
        (AUTO, turn(99, tokens_per_step=4, room=11), 2, "room up to max_model_len"),
        (AUTO, turn(99, tokens_per_step=4, room=3), 1, "room up to max_model_len"),
        (AUTO, turn(99, 99, tokens_per_step=4, token_budget=40), 5, "token budget"),
        (AUTO, turn(99, tokens_per_step=4, host_stops=True), 2, "a request has stop strings"),
        (AUTO, turn(99, tokens_per_step=4, streams=True, step_ms=10.0), 5, "a request streams"),
    ],
)
def test_speculative_rounds(config, seen, num_steps, reason):
    """Times are of rounds, places of tokens: a round reserves those of all its drafts."""
    assert decide(config, seen) == Decision(num_steps, reason)
