"""Traces: what is asked for and by whom, the records of real schedulers, the picture they become.

``engine/test_observability.py`` traces a running server.
"""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import chrome_trace
import pytest
from click.testing import CliRunner
from scheduler.engine import Engine
from scheduler.trace import make_trace

from fusedstep import trace as library
from fusedstep.cli.main import group
from fusedstep.errors import ConfigError, FusedStepError
from fusedstep.vllm_plugin.runner.tracing import TracedStep
from fusedstep.vllm_plugin.scheduler.scheduler import FusedStepScheduler
from fusedstep.vllm_plugin.scheduler.tracing import Tracing
from fusedstep.window import tracing
from fusedstep.window.tracing import TracePage

RECORD = {"kind": "freed", "at": 0, "ids": [], "ends_windows": True}


@pytest.fixture
def page(tmp_path: Path) -> TracePage:
    return TracePage(tmp_path / "fusedstep-test-trace", create=True)


def lend(engine: Engine, other: Tracing) -> None:
    """In place of the scheduler's own, whose page goes."""
    engine.scheduler.tracing.page.unlink()
    engine.scheduler.tracing = engine.scheduler.door.tracing = other


def traced(engine: Engine, path: Path) -> list[dict[str, Any]]:
    """The records of a simulated engine from its start to its end, which takes the page away."""
    page = TracePage(path, create=True)
    lend(engine, Tracing(page))
    with tracing.asking(page, 600) as file:
        engine.run()
        assert page.words[2] == 0  # all turns have come back
        return list(library._records(file))


def busy_engine(seed: int) -> Engine:
    return Engine(make_trace(Random(seed), 40), FusedStepScheduler, "auto")


@pytest.mark.parametrize("seed", (0, 1, 2, 4, 5))  # the model of 3 gets no windows
def test_a_scheduler_tells_every_turn_as_it_counts(tmp_path: Path, seed: int) -> None:
    engine = busy_engine(seed)
    records = traced(engine, tmp_path / "page")
    found, counts = library.Trace(), engine.scheduler.counts
    turns = [record for record in records if record["kind"] == "turn"]
    doors = [record for record in records if record["kind"] in library.CUT_BY]
    library._count(found, turns, [], doors)
    assert (found.windows, found.steps) == (counts.windows, counts.steps)
    assert found.windows > 5
    assert found.one_step_turns == counts.one_step_turns
    assert sum(turn["planned"] - turn["run"] for turn in turns if turn["run"]) == (
        counts.unused_steps
    )
    assert sum(turn["tokens"] for turn in turns) == counts.tokens
    answered = sum(answer.first_at is not None for answer in engine.answers)
    assert answered <= found.first_tokens <= len(engine.answers)
    assert found.arrivals == len(engine.answers)


def test_the_simulated_engines_see_windows_end_for_many_reasons(tmp_path: Path) -> None:
    ends: Counter[str] = Counter()
    for seed in range(6):
        found = library.Trace()
        library._add_engine(found, 0, traced(busy_engine(seed), tmp_path / "page"), 0)
        ends.update(found.ends)
    assert {"all its steps are done", "every request has ended"} <= set(ends)
    assert any(words.startswith("cut short: a request arrived") for words in ends)
    assert not any("came before the turn" in words for words in ends), ends


def test_nobody_asks_and_nothing_is_written(
    page: TracePage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor allocated, nor is the clock read: a turn costs two calls that find nothing."""

    def append(*_: Any) -> None:
        pytest.fail("written")

    monkeypatch.setattr(tracing, "append", append)
    monkeypatch.setattr("fusedstep.vllm_plugin.scheduler.tracing.time", None)
    engine = busy_engine(0)
    lend(engine, quiet := Tracing(page))
    engine.run()
    assert not quiet.under_way and quiet._last == 0
    quiet.begins()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(1000):
        quiet.begins()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 500, grown


def test_a_trace_has_one_reader_and_leaves_nothing(page: TracePage) -> None:
    with tracing.asking(page, 600) as file:
        tracing.append(page.path, page.words[0], RECORD)
        with pytest.raises(tracing.Busy), tracing.asking(TracePage(page.path), 1):
            pass
        assert list(library._records(file)) == [RECORD]
        number = page.words[0]
    assert page.words[0] == 0 and not file.exists()
    tracing.append(page.path, number, RECORD)  # a turn that comes back later
    assert not file.exists()
    with tracing.asking(page, 1):
        pass


def test_a_full_file_gets_no_more(page: TracePage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MAX_BYTES", 100)
    with tracing.asking(page, 600) as file:
        for _ in range(10):
            tracing.append(page.path, page.words[0], RECORD)
        assert 100 <= file.stat().st_size < 200


def test_who_asked_was_killed_and_nobody_writes_for_ever(page: TracePage) -> None:
    """The page still says that somebody asks, but not for longer than he said."""
    page.words[0], page.words[1] = 1, 1
    assert Tracing(page).begins() == 0


def test_a_page_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TracePage(tmp_path / "none")


def turn_of(turn: int, begin: int, end: int, **fields: Any) -> dict[str, Any]:
    """A window of 8 steps that ran from ``begin`` to ``end`` ms, and whose turn has that number."""
    ms = 1_000_000
    defaults = {"planned": 8, "run": 8, "tokens": 8, "limit": "longest window", "requests": 1}
    state = {"waiting": 0, "running": 1, "new": [], "first": [], "finished": []}
    times = {
        "schedule": [begin * ms, begin * ms + ms],
        "update": [end * ms, end * ms + ms],
    }
    ended = {"ended": "all its steps are done"}
    return {"kind": "turn", "turn": turn, **times, **defaults, **state, **ended, **fields}


def step_of(turn: int, begin: int, end: int, **fields: Any) -> dict[str, Any]:
    ms = 1_000_000
    times = {
        "execute": [begin * ms + ms, begin * ms + 2 * ms],
        "sample": [begin * ms + 2 * ms, begin * ms + 3 * ms],
        "ready": end * ms,
    }
    return {"kind": "step", "turn": turn, "reason": None, **times, **fields}


def picture(*records: dict[str, Any]) -> tuple[library.Trace, chrome_trace.Slices]:
    found = library.Trace()
    library._add_engine(found, 0, list(records), 0)
    return found, chrome_trace.read(found.as_json())


def test_a_window_and_who_waited_for_it() -> None:
    arrival = {"kind": "arrival", "at": 20_000_000, "ids": ["late"], "ends_windows": True}
    found, rows = picture(
        turn_of(1, 0, 30, run=3, ended="cut short", waiting=2),
        step_of(1, 0, 29),
        arrival,
        turn_of(2, 31, 40, planned=1, run=1, limit="prefill", new=["late"], first=["late"]),
        step_of(2, 31, 0, ready=None, reason="prefill"),
    )
    window, stock = rows["device"]
    assert (window["name"], window["ts"], window["dur"]) == ("window 3/8", 2000, 27000)
    facts = window["args"]
    assert (facts["planned"], facts["run"], facts["waiting"]) == (8, 3, 2)
    assert facts["ended"] == "cut short: a request arrived"
    assert facts["who waited"] == ["late (10.0 ms)"]
    assert (stock["name"], stock["ts"]) == ("stock step: prefill", 32000)
    assert stock["dur"] == 8000  # nobody told when it was ready: until the scheduler has it
    assert [e["name"] for e in rows["host"]] == [
        "stage window",
        "launch window",
        "stage stock step",
        "launch stock step",
    ]
    assert [e["name"] for e in rows["scheduler"]] == ["schedule", "update"] * 2
    (first,) = (e for e in found.events if e["name"] == "first token")
    assert first["args"]["ms after its arrival"] == 21
    assert (found.windows, found.steps, found.stock_steps) == (1, 3, {"prefill": 1})
    assert found.one_step_turns == {"prefill": 1}


def test_windows_that_are_launched_ahead_follow_each_other_on_the_device() -> None:
    _, rows = picture(turn_of(1, 0, 20), step_of(1, 0, 19), turn_of(2, 5, 40), step_of(2, 5, 39))
    one, two = rows["device"]
    assert two["ts"] == one["ts"] + one["dur"] == 19000


@pytest.mark.parametrize(
    ("event", "words"),
    (
        ({"ph": "X", "dur": -1.0}, "dur"),
        ({"ph": "X", "ts": 1.0, "dur": 5000.0}, "overlaps"),
        ({"ph": "X", "tid": 9}, "row without a name"),
        ({"ph": "b", "id": "r"}, "'b'"),
        ({"ph": "s", "id": "t", "ts": 9e9}, "in no slice"),
    ),
)
def test_the_checker_has_teeth(event: dict[str, Any], words: str) -> None:
    found, _ = picture(turn_of(1, 0, 20), step_of(1, 0, 19))
    event = {"name": "x", "pid": 0, "tid": 3, "ts": 0.5, "cat": "c", **event}
    if event["ph"] == "X":
        event = {"dur": 1.0, "args": {}, **event}
    if event["ph"] == "b":
        event["args"] = {}
    found.events.append(event)
    with pytest.raises(AssertionError, match=words):
        chrome_trace.read(found.as_json())


class Device(SimpleNamespace):
    type = "cuda"


def test_a_step_of_a_gpu_is_ready_when_the_host_has_its_tokens(page: TracePage) -> None:
    with tracing.asking(page, 600) as file:
        stamp = SimpleNamespace(file=page.words[0], turn=7)
        for has_tokens in (False, True):
            step = TracedStep(page.path, stamp, Device())  # type: ignore[arg-type]
            step.end("execute")
            step.write(reason=None, has_tokens=has_tokens)
        unknown, known = library._records(file)
    assert unknown["ready"] is None and known["ready"] >= known["execute"][1]


def run(*args: str) -> str:
    """stderr of the command, which fails with one line."""
    result = CliRunner().invoke(group, ["trace", *args])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_wrong_usage_is_one_line(tmp_path: Path) -> None:
    assert "no metrics at http://127.0.0.1:1/metrics" in run(
        "--url", "1", "-o", str(tmp_path / "t.json")
    )
    assert "leave out MODEL" in run("--url", "1", "m")
    assert "leave out MODEL" in run("--url", "1", "--decode-steps", "4")
    assert "name another file after --output" in run("-o", "no/such/t.json")
    assert "--seconds" in run("--seconds", "0")


@pytest.mark.parametrize(
    ("labels", "words"),
    (
        (None, "is of another version"),
        ({"engine": "0", "page": "fusedstep-no-such-trace"}, "does not run on this machine"),
    ),
)
def test_a_server_that_cannot_be_traced(
    monkeypatch: pytest.MonkeyPatch, labels: dict[str, str] | None, words: str
) -> None:
    samples = [] if labels is None else [SimpleNamespace(labels=labels)]
    family = SimpleNamespace(name=library.TRACE, samples=samples)
    monkeypatch.setattr(library, "families", lambda _: [family])
    with pytest.raises(ConfigError, match=words):
        library.trace("8000", 0.1)


def test_somebody_traces_it_already(monkeypatch: pytest.MonkeyPatch, page: TracePage) -> None:
    monkeypatch.setattr(library, "_pages", lambda _: [page])
    with tracing.asking(page, 600), pytest.raises(FusedStepError, match="already"):
        library.trace("8000", 0.1)
