"""A trace of a running server's turns, for chrome://tracing and https://ui.perfetto.dev.

The engine's processes write records while somebody asks (``fusedstep/window/tracing.py``); here
they become a row for the scheduler, the host and the device of each engine, and one for requests.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedstep.errors import ConfigError, FusedStepError
from fusedstep.explain import TRACE, families, metrics_url
from fusedstep.window import tracing
from fusedstep.window.page import shared_file
from fusedstep.window.tracing import TracePage

Event = dict[str, Any]
Record = dict[str, Any]

ROWS = {"scheduler": 1, "host": 2, "device": 3, "requests": 4}
CUT_SHORT = "cut short"
CUT_BY = {
    "arrival": "a request arrived",
    "abort": "a request was aborted",
    "freed": "a row got free for a waiting request, or nothing runs any more",
}


@dataclass
class Trace:
    """Events in Chrome's format, and what they sum up to."""

    events: list[Event] = field(default_factory=list)
    windows: int = 0
    steps: int = 0  # of windows
    one_step_turns: Counter[str] = field(default_factory=Counter)  # by reason
    stock_steps: Counter[str] = field(default_factory=Counter)  # of the worker, by reason
    ends: Counter[str] = field(default_factory=Counter)  # of windows
    arrivals: int = 0
    first_tokens: int = 0
    full: bool = False  # later turns are left out

    def as_json(self) -> str:
        """The file's content, in the format's "JSON object" form."""
        content = {
            "traceEvents": self.events,
            "displayTimeUnit": "ms",
            "otherData": {"clock": "CLOCK_MONOTONIC", "windows": self.windows, "steps": self.steps},
        }
        return json.dumps(content, separators=(",", ":"))


def trace(url: str, seconds: float) -> Trace:
    """The turns of the server at ``url``, which runs on this machine, in the next ``seconds``.

    Raises:
        ConfigError: there is no such server, it is not ours, or not here.
        FusedStepError: another process traces it.
    """
    pages = _pages(url)
    with ExitStack() as stack:
        began = time.monotonic_ns()
        try:
            files = [stack.enter_context(tracing.asking(page, seconds + 1)) for page in pages]
        except tracing.Busy:
            raise FusedStepError(f"somebody traces {url} already: try again later") from None
        except OSError as error:
            raise FusedStepError(f"cannot write the trace's records ({error.strerror})") from None
        time.sleep(seconds)
        for page in pages:
            tracing.finish(page)
        result = Trace(full=any(f.stat().st_size >= tracing.MAX_BYTES for f in files))
        for engine, file in enumerate(files):
            _add_engine(result, engine, list(_records(file)), began)
    return result


def _pages(url: str) -> list[TracePage]:
    """A page of shared memory per engine of the server."""
    samples = [s for family in families(url) if family.name == TRACE for s in family.samples]
    if not samples:
        raise ConfigError(f"the server at {metrics_url(url)} is of another version: no traces")
    samples.sort(key=lambda sample: int(sample.labels["engine"]))
    names = [sample.labels["page"].removeprefix("fusedstep-") for sample in samples]
    try:
        return [TracePage(shared_file(Path(name).name)) for name in names]
    except PermissionError:
        raise ConfigError(f"the server at {url} is another user's: trace it as that user") from None
    except OSError:
        raise ConfigError(
            f"the server at {url} does not run on this machine (or not in this container): "
            "run fusedstep trace beside it"
        ) from None


def _records(file: Path) -> Iterator[Record]:
    for line in file.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the file's memory was full
            return


class _Rows:
    """Events of one engine, their times in microseconds from the trace's begin."""

    def __init__(self, events: list[Event], engine: int, began: int) -> None:
        self.events, self.engine, self.began = events, engine, began
        self._add("process_name", "M", args={"name": f"engine {engine}"})
        for name, row in ROWS.items():
            self._add("thread_name", "M", tid=row, args={"name": name})
            self._add("thread_sort_index", "M", tid=row, args={"sort_index": row})

    def _add(self, name: str, phase: str, **fields: Any) -> None:
        self.events.append({"name": name, "ph": phase, "pid": self.engine, "tid": 0, **fields})

    def us(self, ns: int) -> float:
        return (ns - self.began) / 1e3

    def slice(self, row: str, name: str, begin: int, end: int, **args: Any) -> None:
        fields = {"tid": ROWS[row], "ts": self.us(begin), "dur": (end - begin) / 1e3}
        self._add(name, "X", cat=row, args=args, **fields)

    def instant(self, name: str, at: int, **args: Any) -> None:
        self._add(name, "i", cat="request", tid=ROWS["requests"], ts=self.us(at), s="t", args=args)

    def counter(self, at: int, **values: int) -> None:
        self._add("queue", "C", ts=self.us(at), args=values)

    def arrow(self, turn: int, begin: int, end: int) -> None:
        """From a turn's end in the scheduler to its begin on the device.

        Perfetto draws arrows whose id is a number, of all engines in one space.
        """
        common = {"cat": "turn", "id": self.engine << 32 | turn}
        self._add("turn", "s", tid=ROWS["scheduler"], ts=self.us(begin), **common)
        self._add("turn", "f", tid=ROWS["device"], ts=self.us(end), bp="e", **common)

    def request(self, request_id: str, begin: int, end: int) -> None:
        """A row of its own for a request, from its arrival to its end."""
        common = {"cat": "request", "id": request_id, "tid": ROWS["requests"]}
        self._add("request", "b", ts=self.us(begin), args={"request": request_id}, **common)
        self._add("request", "e", ts=self.us(end), **common)


def _add_engine(result: Trace, engine: int, records: list[Record], began: int) -> None:
    rows = _Rows(result.events, engine, began)
    turns = {record["turn"]: record for record in records if record["kind"] == "turn"}
    steps = {record["turn"]: record for record in records if record["kind"] == "step"}
    doors = sorted((r for r in records if r["kind"] in CUT_BY), key=lambda r: r["at"])
    free_at = 0  # the device
    for number in sorted(turns):
        turn, step = turns[number], steps.get(number)
        rows.slice("scheduler", "schedule", *turn["schedule"], turn=number)
        rows.slice("scheduler", "update", *turn["update"], turn=number, tokens=turn["tokens"])
        rows.counter(turn["schedule"][1], running=turn["running"], waiting=turn["waiting"])
        if step is None or step["reason"] == "":  # nothing was scheduled
            continue
        kind = "window" if step["reason"] is None else "stock step"
        for words, part in (("stage", "execute"), ("launch", "sample")):
            if part in step:
                rows.slice("host", f"{words} {kind}", *step[part], turn=number)
        begin = max(step["sample" if step["reason"] is None else "execute"][0], free_at)
        free_at = max(step["ready"] or turn["update"][0], begin)
        rows.arrow(number, turn["schedule"][1], begin)
        rows.slice("device", _title(turn, step), begin, free_at, **_facts(turn, step, doors))
    _count(result, turns.values(), steps.values(), doors)
    _add_requests(rows, list(turns.values()), doors)


def _title(turn: Record, step: Record) -> str:
    if step["reason"] is not None:
        return f"stock step: {step['reason']}"
    return f"window {turn['run']}/{turn['planned']}"


def _facts(turn: Record, step: Record, doors: list[Record]) -> dict[str, Any]:
    """A slice's arguments: what was planned, what ran, why it ended, who waited."""
    facts = {
        "turn": turn["turn"],
        "planned": turn["planned"],
        "run": turn["run"],
        "tokens": turn["tokens"],
        "requests": turn["requests"],
        "no more because": turn["limit"],
        "waiting": turn["waiting"],
    }
    if step["reason"] is not None:
        return facts | {"stock step because": step["reason"]}
    begin, end = turn["schedule"][0], turn["update"][0]
    meanwhile = [door for door in doors if begin <= door["at"] <= end]
    came = {i: door["at"] for door in meanwhile if door["kind"] == "arrival" for i in door["ids"]}
    return facts | {
        "ended": _why_ended(turn, doors),
        "who waited": [f"{i} ({(end - at) / 1e6:.1f} ms)" for i, at in came.items()],
    }


def _why_ended(turn: Record, doors: list[Record]) -> str:
    ended: str = turn["ended"]
    if ended != CUT_SHORT and turn["run"]:
        return ended
    begin, end = turn["schedule"][0], turn["update"][1]
    by = next((d for d in doors if begin <= d["at"] <= end and d["ends_windows"]), None)
    words = CUT_BY[by["kind"]] if by else "it came before the turn"
    return f"{ended}: {words}"


def _count(result: Trace, turns: Any, steps: Any, doors: list[Record]) -> None:
    """As the scheduler and the worker count (``fusedstep/counts.py``)."""
    for turn in (turn for turn in turns if turn["run"]):
        if turn["planned"] == 1:
            result.one_step_turns[turn["limit"]] += 1
            continue
        result.windows += 1
        result.steps += turn["run"]
        result.ends[_why_ended(turn, doors)] += 1
    result.stock_steps.update(step["reason"] for step in steps if step["reason"])
    result.arrivals += sum(door["kind"] == "arrival" for door in doors)
    result.first_tokens += sum(len(turn["first"]) for turn in turns)


def _add_requests(rows: _Rows, turns: list[Record], doors: list[Record]) -> None:
    """Arrivals, first tokens, and a row for each request whose arrival was seen."""
    arrived = {i: d["at"] for d in doors if d["kind"] == "arrival" for i in d["ids"]}
    for request_id, at in arrived.items():
        rows.instant("arrival", at, request=request_id)
    ends = {i: turn["update"][1] for turn in turns for i in turn["finished"]}
    for turn in turns:
        at = turn["update"][1]
        for request_id in turn["first"]:
            facts: dict[str, Any] = {"request": request_id}
            if request_id in arrived:
                facts["ms after its arrival"] = (at - arrived[request_id]) / 1e6
            rows.instant("first token", at, **facts)
    last = max((turn["update"][1] for turn in turns), default=0)
    for request_id, at in arrived.items():
        rows.request(request_id, at, max(ends.get(request_id, last), at))
