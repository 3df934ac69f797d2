"""The simulated fleet of docs/scale.md: turns by the real policy, and the page's own numbers."""

from __future__ import annotations

import re
import shlex
from random import Random
from typing import Any

import pytest
from docs_blocks import ROOT

from fusedstep.bench import fleet
from fusedstep.bench.fleet import Counts, Engine, Replica, Request, Router, StepModel
from fusedstep.policy import DecodeSteps

STEP = StepModel(2.0, 0.0, 0.01)  # 2 ms, and 1 ms for a prompt of 100
PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")
COMMANDS = re.findall(r"```sh\npython -m fusedstep\.bench\.fleet (.+)\n```\n\n((?:\|.*\n)+)", PAGE)


def serve(*requests: Request, steps: str | None = "auto", **options: Any) -> Counts:
    """By one replica with two places; nobody streams."""
    policy = None if steps is None else DecodeSteps.parse(steps)
    engine = Engine(STEP, 2, options.pop("streams", False), 50.0, policy)
    return fleet.simulate(engine, 1, list(requests), "least", Random(0))


def asked(at: float, tokens: int) -> Request:
    return Request(at, 100, tokens)


def test_stock_alone() -> None:
    """A prompt's turn, then a step for each token."""
    one = asked(5.0, 101)
    serve(one, steps=None)
    assert (one.first, one.last, one.tokens) == pytest.approx((8.0, 208.0, 101))
    assert one.longest_pause == pytest.approx(2.0)


def test_a_window_gives_its_tokens_at_its_end() -> None:
    one = asked(0.0, 101)
    counts = serve(one)
    assert (one.first, one.last, one.tokens) == pytest.approx((3.0, 203.0, 101))
    assert one.longest_pause == pytest.approx(128.0)  # 64 steps
    assert (counts.windows, counts.steps, counts.unused) == (2, 100, 0)


def test_an_arrival_ends_a_window_after_the_step_in_flight() -> None:
    one, two = asked(0.0, 101), asked(10.5, 5)
    counts = serve(one, two)
    assert two.first == pytest.approx(11.0 + 3.0)
    assert counts.unused >= 60 and one.tokens == 101 and two.tokens == 5


def test_a_full_house_ends_at_the_first_stop() -> None:
    one, two, three = asked(0.0, 101), asked(0.0, 11), asked(4.0, 5)
    serve(one, two, three)
    assert two.last == pytest.approx(3.0 + 3.0 + 10 * 2.0)  # a turn for each prompt
    assert three.first == pytest.approx(two.last + 3.0)


def test_who_finds_no_place_ends_no_window() -> None:
    """Nor is a row that stops within a window known to have stopped before its end."""
    one, two, three = asked(0.0, 101), asked(0.0, 11), asked(10.5, 5)
    serve(one, two, three)
    assert two.last == pytest.approx(3.0 + 3.0 + 64 * 2.0)
    assert three.first == pytest.approx(two.last + 3.0)


def test_stock_has_a_place_when_the_first_ends() -> None:
    one, two, three = asked(0.0, 101), asked(0.0, 11), asked(4.0, 5)
    serve(one, two, three, steps=None)
    assert two.last == pytest.approx(3.0 + 3.0 + 10 * 2.0)
    assert three.first == pytest.approx(two.last + 3.0)


def test_a_turn_has_a_budget_of_tokens_and_a_step_a_price_for_each_row() -> None:
    engine = Engine(StepModel(2.0, 0.5, 0.01), 20, False, 50.0, DecodeSteps())
    replica = Replica(engine, Counts())
    replica.waiting.extend(Request(0.0, 1000, 5) for _ in range(9))
    assert replica.begin(0.0) == pytest.approx(2.0 + 8 * 0.5 + 8 * 10.0)
    assert (len(replica.joining), len(replica.waiting)) == (8, 1)


def test_streams_wait_no_longer_than_told() -> None:
    one = asked(0.0, 400)
    serve(one, streams=True)
    assert 40.0 < one.longest_pause <= 52.0


@pytest.mark.parametrize("routing", fleet.ROUTERS)
def test_routers(routing: str) -> None:
    engine = Engine(STEP, 2, False, 50.0, DecodeSteps())
    replicas = [Replica(engine, Counts()) for _ in range(4)]
    router = Router(routing, replicas, Random(1))
    chosen = []
    for _ in range(40):
        chosen.append(router.choose())
        replicas[chosen[-1]].waiting.append(asked(0.0, 1))
        router.changed(chosen[-1])
    held = sorted(replica.held for replica in replicas)
    assert (held == [10] * 4) == (routing != "random") and sum(held) == 40
    for _ in range(3):
        replicas[2].waiting.popleft()
        router.changed(2)
    assert [router.choose() for _ in range(3)] == [2, 2, 2] or routing != "least"


PAGES = [
    pytest.param(*each, marks=[pytest.mark.exhaustive] if "1000" in each[0] else [])
    for each in COMMANDS
]


@pytest.mark.parametrize(("words", "table"), PAGES, ids=[words for words, _ in COMMANDS])
def test_the_page_has_the_commands_own_numbers(
    words: str, table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(COMMANDS) == 6
    assert fleet.main(shlex.split(words)) == 0
    assert capsys.readouterr().out == table
