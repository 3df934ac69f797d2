"""The soak for a minute, with a killed worker at its end; and that it sees what is wrong."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from fusedstep.bench.progress import Progress
from fusedstep.bench.soak import __main__ as soak
from fusedstep.bench.soak import load as soak_load
from fusedstep.bench.soak.load import Answer, Load, Wrong, check
from fusedstep.bench.soak.requests import CHAT, COMPLETIONS, SCHEMA, Request, random_request

SCRIPT = Path(soak.__file__)
PASSED = soak.Report(
    env={},
    asked={"fixed": 2},
    ended={"fixed": 2},
    lost=0,
    texts_changed=0,
    problems=[],
    tokens_per_event=2.0,
    preemptions=0,
    rss_mib={"start": 900, "warm": 1000, "end": 1001, "growth": 1},
    left={},
    bad_lines=[],
    exit_code=0,
    processes_left=0,
    killed=None,
)
KILLED = replace(PASSED, exit_code=1, killed={"clients": 4, "told": 4, "saw": [], "seconds": 1})


def test_a_minute_of_mixed_load_and_then_a_killed_worker(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    command = [sys.executable, str(SCRIPT), "--minutes=1", "--kill-worker", f"--json={path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["passed"] and report["ended"] == report["asked"]
    assert set(report["ended"]) == set(soak_load.SHARES)
    assert sum(report["ended"].values()) > 50
    assert report["killed"]["told"] == 4


@pytest.mark.parametrize("report", (PASSED, KILLED, replace(PASSED, exit_code=130)))
def test_a_soak_without_faults(report: soak.Report) -> None:
    assert report.faults == []


@pytest.mark.parametrize(
    ("report", "words"),
    (
        (replace(PASSED, lost=1), "1 requests did not end"),
        (replace(PASSED, texts_changed=2), "2 fixed requests changed"),
        (replace(PASSED, ended={}), "no request of some kind"),
        (replace(PASSED, ended={"fixed": 2, "random": 0}), "no request of some kind"),
        (replace(PASSED, rss_mib={"growth": 500}), "memory grew by 500 MiB"),
        (replace(PASSED, left={"vllm:kv_cache_usage_perc": 0.1}), "not idle"),
        (replace(PASSED, bad_lines=["ERROR"]), "1 bad lines"),
        (replace(PASSED, exit_code=1), "exit code 1"),
        (replace(PASSED, exit_code=None), "exit code None"),
        (replace(PASSED, processes_left=1), "1 processes are left"),
        (replace(KILLED, exit_code=0), "exit code 0"),
        (replace(KILLED, exit_code=None), "exit code None"),
        (replace(KILLED, killed={"clients": 4, "told": 3}), "1 clients do not know"),
    ),
)
def test_a_fault_is_named(report: soak.Report, words: str) -> None:
    (fault,) = report.faults
    assert words in fault


@pytest.mark.parametrize(
    ("body", "answer", "words"),
    (
        ({}, Answer(["x"], [None], [0], 4), "ended with"),
        ({}, Answer(["x"], ["abort"], [0], 4), "ended with"),
        ({}, Answer(["x"], ["length"], [0], 3), "3 tokens, not 4"),
        ({}, Answer(["x"], ["stop"], [0], 5), "too many"),
        ({"n": 2}, Answer(["x", "y"], ["length", "length"], [0, 0], 7), "7 tokens, not 8"),
        ({"logprobs": 2}, Answer(["x"], ["length"], [3], 4), "3 logprobs of 4"),
        ({"stop": ["."]}, Answer(["x."], ["stop"], [0], 2), "stop string"),
        ({"response_format": {}}, Answer(['{"name": "Ada"}'], ["stop"], [0], 4), "schema"),
    ),
)
def test_a_wrong_answer_is_seen(body: dict[str, Any], answer: Answer, words: str) -> None:
    with pytest.raises(Wrong, match=words):
        check(Request(COMPLETIONS, {"max_tokens": 4, **body}), answer)


def test_right_answers_pass() -> None:
    whole = '{"name": "Ada", "age": 9}'
    check(Request(CHAT, {"max_tokens": 4, "response_format": {}}), Answer([whole], ["stop"], [0]))
    check(
        Request(CHAT, {"max_tokens": 4, "response_format": {}}), Answer(["{"], ["length"], [0], 4)
    )
    check(Request(COMPLETIONS, {"max_tokens": 2, "n": 2}), Answer(["", ""], ["length"] * 2, [0], 4))
    assert set(SCHEMA["required"]) == {"name", "age"}


def test_random_requests_are_of_every_kind() -> None:
    rng = random.Random(0)
    requests = [random_request(rng) for _ in range(300)]
    assert {request.path for request in requests} == {COMPLETIONS, CHAT}
    assert {request.choices for request in requests} == {1, 2, 3}
    names = Counter(name for request in requests for name in request.body)
    assert {"stop", "logprobs", "ignore_eos", "seed", "min_p", "response_format"} <= set(names)


@contextmanager
def stand_in(status: int, body: bytes) -> Iterator[str]:
    """The URL of a server that answers every request alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


TEXT = b'data: {"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error": "dead"}\n\n'


@pytest.mark.parametrize(
    ("status", "body", "words"),
    (
        pytest.param(200, TEXT + USAGE, "a stream was cut off", id="cut off"),
        pytest.param(200, TEXT + ERROR, "an error in a stream", id="error"),
        pytest.param(500, b"no", "got 500: no", id="status"),
        pytest.param(200, TEXT + USAGE + DONE, None, id="whole"),
    ),
)
def test_a_stream_is_read_to_its_end(status: int, body: bytes, words: str | None) -> None:
    async def ask(url: str) -> Answer:
        load = Load(url, "m", clients=1, seed=0)
        async with soak_load.session(url) as load.session:
            return await load.ask(Request(COMPLETIONS, {"max_tokens": 1}), stream=True)

    with stand_in(status, body) as url:
        if words is None:
            assert asyncio.run(ask(url)) == Answer(["x"], ["length"], [0], 1, events=1)
            return
        with pytest.raises(Wrong, match=words):
            asyncio.run(ask(url))


def test_no_client_is_told_of_a_fault_that_did_not_come() -> None:
    async def watch(url: str) -> tuple[str | None, bool]:
        streaming = asyncio.Event()
        load = Load(url, "m", clients=1, seed=0)
        return await soak_load.hang_up_or_error(load, streaming), streaming.is_set()

    with stand_in(200, TEXT + USAGE + DONE) as url:
        assert asyncio.run(watch(url)) == (None, True)
    with stand_in(200, TEXT) as url:
        assert asyncio.run(watch(url)) == ("Wrong: a stream was cut off", True)


def test_a_soak_tells_how_it_goes_and_keeps_it() -> None:
    load = Load("http://127.0.0.1:1", "m", clients=1, seed=0)
    load.tally.asked["fixed"] = 3
    said: list[str] = []
    kept: list[dict[str, Any]] = []
    soak._tell(load, [1 << 20] * 20, 60.0, Progress(said.append, kept.append))
    assert said == ["10 of 60 s: 3 requests, 0 problems, 1 MiB"]
    assert kept[0]["asked"] == {"fixed": 3} and kept[0]["rss_mib"] == [1.0] * 20


@pytest.mark.parametrize(
    ("args", "words"),
    (
        (("--minutes", "0"), "must be numbers above 0"),
        (("--minutes", "nan"), "must be numbers above 0"),
        (("--minutes", "inf"), "must be numbers above 0"),
        (("--minutes", "x"), "argument --minutes: invalid float value: 'x'"),
        (("--clients", "0"), "must be numbers above 0"),
        (("--minuts", "1"), "no option --minuts: did you mean --minutes?"),
        (("--json", "."), "cannot write . (it is a folder)"),
        (("no/such/model",), "no model at no/such/model"),
        (("--json", "no/such/file"), "its folder does not exist"),
        (("--decode-steps", "x"), "--decode-steps must be"),
        (("--port", "1"), "--port is chosen here"),
    ),
)
def test_wrong_usage_is_one_line(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str
) -> None:
    assert soak.main([*args]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and words in err
