"""The policy is a pure function: every limit, and what it says about itself."""

import pytest

from fusedstep.errors import ConfigError
from fusedstep.policy import (
    MAX_STEPS,
    MAX_STEPS_STREAMING,
    DecodeSteps,
    DecodingRequest,
    Turn,
    decide,
)

AUTO = DecodeSteps()


def turn(*remaining: int, **fields: object) -> Turn:
    """A turn of requests that have computed 100 tokens each."""
    return Turn([DecodingRequest(n, 100) for n in remaining], **fields)  # type: ignore[arg-type]


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
        (AUTO, turn(1000, prefill_in_flight=True), 1, "a prefill is in flight"),
        (AUTO, turn(1000, admissible=True), 1, "a waiting request can be admitted"),
        (AUTO, turn(1000, stock_reason="LoRA"), 1, "LoRA"),
        (AUTO, turn(), 1, "nothing decodes"),
        (AUTO, turn(1000, streams=True), MAX_STEPS_STREAMING, "a request streams"),
        (DecodeSteps(32), turn(1000, streams=True), 32, "fixed"),
        (AUTO, turn(1000, 1000, token_budget=20), 10, "token budget"),
        (AUTO, turn(1000, 1000, token_budget=1), 1, "token budget"),
    ],
)
def test_limits(config, seen, num_steps, reason):
    decision = decide(config, seen)
    assert (decision.num_steps, decision.reason) == (num_steps, reason)


def test_a_reservation_fits_the_free_blocks():
    """Two requests at token 100 of 16-token blocks (12 free places): 64 steps add 8 blocks."""
    for free_blocks in range(10):
        steps = decide(AUTO, turn(1000, 1000, free_blocks=free_blocks, block_size=16)).num_steps
        added = 2 * (-(-(100 + steps) // 16) - -(-100 // 16))
        assert steps >= 1 and added <= free_blocks
    assert decide(AUTO, turn(1000, 1000, free_blocks=8, block_size=16)).num_steps == MAX_STEPS
