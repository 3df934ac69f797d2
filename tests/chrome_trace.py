"""A strict reader of Chrome's trace format ("Trace Event Format", JSON object form).

It refuses what a viewer would draw wrongly or leave out: slices of a row that overlap without being
nested, arrows that begin or end outside of a slice, a request's row that is never closed.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

# Phase -> the fields that it must have beside name, ph, pid and tid.
FIELDS = {
    "X": {"ts", "dur", "cat", "args"},
    "i": {"ts", "s", "cat", "args"},
    "C": {"ts", "args"},
    "M": {"args"},
    "b": {"ts", "id", "cat", "args"},
    "e": {"ts", "id", "cat"},
    "s": {"ts", "id", "cat"},
    "f": {"ts", "id", "cat", "bp"},
}
METADATA = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}
Slices = dict[str, list[dict[str, Any]]]


def _no_constant(word: str) -> float:
    raise AssertionError(f"{word} is not JSON")


def read(text: str) -> Slices:
    """The slices ("X") of each row, in order of time; AssertionError for what is not the format."""
    content = json.loads(text, parse_constant=_no_constant)
    assert content["displayTimeUnit"] in ("ms", "ns")
    events: list[dict[str, Any]] = content["traceEvents"]
    for event in events:
        phase = event["ph"]
        assert set(event) == {"name", "ph", "pid", "tid"} | FIELDS[phase], event
        assert isinstance(event["name"], str) and event["name"], event
        assert type(event["pid"]) is type(event["tid"]) is int, event
        for name in {"ts", "dur"} & set(event):
            assert isinstance(event[name], (int, float)) and math.isfinite(event[name]), event
        assert event.get("dur", 0) >= 0, event
        if phase == "M":
            assert set(event["args"]) == {METADATA[event["name"]]}, event
        elif phase == "C":
            assert event["args"] and all(type(n) is int for n in event["args"].values()), event
        elif phase == "i":
            assert event["s"] in ("g", "p", "t"), event
    slices = {
        event["args"]["name"]: sorted(
            (e for e in events if e["ph"] == "X" and _row(e) == _row(event)),
            key=lambda e: (e["ts"], -e["dur"]),
        )
        for event in events
        if event["name"] == "thread_name"
    }
    rows = [_row(event) for event in events if event["name"] == "thread_name"]
    assert {_row(e) for e in events if e["ph"] in "Xisf"} <= set(rows), "a row without a name"
    for row in slices.values():
        _check_nesting(row)
    _check_arrows(events)
    _check_pairs(events)
    return slices


def _row(event: dict[str, Any]) -> tuple[int, int]:
    return event["pid"], event["tid"]


def _check_nesting(row: list[dict[str, Any]]) -> None:
    """Times are rounded to a nanosecond's thousandth of a microsecond."""
    ends: list[float] = []
    for event in row:
        while ends and ends[-1] <= event["ts"] + 1e-3:
            ends.pop()
        end = event["ts"] + event["dur"]
        assert not ends or end <= ends[-1] + 1e-3, f"it overlaps the slice before it: {event}"
        ends.append(end)


def _check_arrows(events: list[dict[str, Any]]) -> None:
    ends = defaultdict(list)
    for event in events:
        if event["ph"] in "sf":
            ends[event["cat"], event["id"]].append(event)
            assert any(
                e["ts"] - 1e-3 <= event["ts"] <= e["ts"] + e["dur"] + 1e-3
                for e in events
                if e["ph"] == "X" and _row(e) == _row(event)
            ), f"it is in no slice: {event}"
    for arrow in ends.values():
        assert [e["ph"] for e in arrow] == ["s", "f"], arrow
        assert arrow[0]["ts"] <= arrow[1]["ts"] + 1e-3 and arrow[1]["bp"] == "e", arrow


def _check_pairs(events: list[dict[str, Any]]) -> None:
    pairs = defaultdict(list)
    for event in events:
        if event["ph"] in "be":
            pairs[event["pid"], event["cat"], event["id"]].append(event)
    for pair in pairs.values():
        assert [e["ph"] for e in pair] == ["b", "e"] and pair[0]["ts"] <= pair[1]["ts"], pair
