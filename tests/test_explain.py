"""From the scheduler's counts over shared memory and Prometheus to the table of `explain`."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry, generate_latest

from fusedstep.cli.main import group
from fusedstep.errors import ConfigError
from fusedstep.explain import explain, metrics_url, read
from fusedstep.options import Options
from fusedstep.vllm_plugin import compat, metrics, shared
from fusedstep.vllm_plugin.frontend import ExplainRoute, explain_route
from fusedstep.vllm_plugin.launch import server
from fusedstep.vllm_plugin.scheduler.counts import PublishedCounts
from fusedstep.window.page import SIZE, Page


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    page = Page(f"test-{tmp_path.name}")
    yield page
    page.unlink()


def counted(page: Page | None = None) -> PublishedCounts:
    counts = PublishedCounts(page)
    counts.drafts, counts.accepted_drafts = 40, 14
    counts.add_turn("longest window", 64, 64, 128)
    counts.add_turn("longest window", 64, 10, 20, 3)  # one row's 10 steps, two with 5 each
    counts.add_turn("a request streams", 8, 8, 8)
    counts.add_turn("structured output", 1, 1, 1)
    counts.add_turn("prefill", 1, 0, 0)
    counts.host_seconds = 0.5
    counts.refused_tokens = 2
    counts.publish(now=True)
    return counts


def config(scheduler_cls: str = compat.SCHEDULER_CLS, name: str = "x") -> Any:
    return SimpleNamespace(
        instance_id=name,
        parallel_config=SimpleNamespace(
            data_parallel_index=0, data_parallel_rank=0, data_parallel_size_local=2
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler_cls),
    )


@pytest.fixture
def stat_logger(monkeypatch: pytest.MonkeyPatch, page: Page) -> metrics.WindowStatLogger:
    monkeypatch.setattr(metrics, "counts_page", lambda *_: page)
    monkeypatch.setattr(metrics, "REGISTRY", CollectorRegistry())
    return metrics.WindowStatLogger(config())


@pytest.fixture
def url(stat_logger: metrics.WindowStatLogger) -> Iterator[str]:
    """A server whose metrics these are."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = generate_latest(metrics.REGISTRY) + b"# HELP vllm:x x\nvllm:x 1.0\n"
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_page_is_read_whole(page: Page) -> None:
    reader = Page(page.path.name.removeprefix("fusedstep-"))
    assert reader.read() is None
    for value in ({"a": "x" * 1000}, {"a": 1}, [1, 2.5, None]):
        page.write(value)
        assert reader.read() == value
    with pytest.raises(ValueError, match="do not fit"):
        page.write("x" * SIZE)
    assert reader.read() == [1, 2.5, None]
    page._header[0] += 1  # the writer dies while it writes
    assert reader.read() is None


def test_reader_and_writer_at_once(page: Page) -> None:
    """Whatever is read was written as a whole."""
    pause = threading.Event()

    def write() -> None:
        for n in range(1, 1001):
            page.write([n] * (n % 500 + 1))
            pause.wait(1e-4)

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    while thread.is_alive():
        seen.append(page.read())
    assert all(len(set(numbers)) == 1 for numbers in seen if numbers is not None)
    assert len({numbers[0] for numbers in seen if numbers is not None}) > 10


def test_counts(page: Page) -> None:
    counted(page)
    assert page.read() == {
        "seconds": None,
        "windows": 3,
        "steps": 82,
        "unused_steps": 54,
        "idle_row_steps": 10,
        "early_exits": 1,
        "refused_tokens": 2,
        "tokens": 157,
        "drafts": 40,
        "accepted_drafts": 14,
        "host_seconds": 0.5,
        "one_step_turns": {"structured output": 1},
        "limits": {"longest window": 2, "a request streams": 1},
        "lengths": {"1": 0, "2": 0, "4": 0, "8": 1, "16": 2, "32": 2, "64": 3},
    }


def test_prometheus(stat_logger: metrics.WindowStatLogger, page: Page) -> None:
    lines = generate_latest(metrics.REGISTRY).decode().splitlines()
    name = stat_logger.trace.name  # nothing has happened: only who wants a trace is told
    assert [x for x in lines if not x.startswith("#")] == [
        f'fusedstep:trace_info{{engine="0",page="{name}"}} 1.0'
    ]
    counted(page)
    text = generate_latest(metrics.REGISTRY).decode()
    for line in (
        'fusedstep:windows_total{engine="0"} 3.0',
        'fusedstep:one_step_turns_total{engine="0",reason="structured output"} 1.0',
        'fusedstep:window_steps_bucket{engine="0",le="16"} 2.0',
        'fusedstep:window_steps_bucket{engine="0",le="+Inf"} 3.0',
        'fusedstep:window_steps_sum{engine="0"} 82.0',
    ):
        assert line in text, text


def test_log_line_tells_what_is_new(
    stat_logger: metrics.WindowStatLogger, page: Page, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="vllm.fusedstep")
    metrics.logger.addHandler(caplog.handler)
    try:
        stat_logger.log()
        counts = counted(page)
        stat_logger.log()
        stat_logger.log()
        counts.add_turn("fixed", 4, 4, 4)
        counts.publish(now=True)
        stat_logger.log()
    finally:
        metrics.logger.removeHandler(caplog.handler)
    lines = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert lines == [
        "fusedstep: 3 windows of 27.3 steps, 1 ended early, 3.185 host ms per token"
        "; one-step turns: 1 x structured output",
        "fusedstep: 1 windows of 4.0 steps, 0 ended early, 0.000 host ms per token"
        "; one-step turns: none",
    ]


def test_stock_scheduler_has_no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "REGISTRY", None)  # must not be touched
    metrics.WindowStatLogger(config(scheduler_cls="auto")).log()


def test_explain(url: str, page: Page) -> None:
    counted(page)
    windows = explain(url)
    assert (windows.windows, windows.steps, windows.tokens) == (3, 82, 157)
    assert windows.limits == {"longest window": 2, "a request streams": 1}
    assert windows.one_step_turns == {"structured output": 1}
    assert windows.lengths[16] == 2
    assert windows.host_ms_per_token == pytest.approx(500 / 157)
    assert windows.since(read(f"{url}/v1/"), 2.0).windows == 0


def test_command(url: str, page: Page, tmp_path: Path) -> None:
    counted(page)
    result = CliRunner().invoke(group, ["explain", "--url", url])
    assert result.exit_code == 0, result.output
    for words in (
        "longest window",
        "structured output",
        "50%",
        "3 windows of 27.3 steps",
        "2 requests failed",
        "40 drafts were verified: 35% held",
    ):
        assert words in result.output
    result = CliRunner().invoke(group, ["explain", "--url", url, "--json", "-"])
    assert json.loads(result.stdout)["early_exits"] == 1


def test_watch_goes_on_until_it_is_interrupted(url: str, page: Page) -> None:
    """A process of its own, as under a terminal: every table is of the time since the last."""
    counts = counted(page)
    command = ["-m", "fusedstep", "explain", "--url", url, "--watch", "--seconds", "0.5"]
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while len(tables := [line for line in lines if "steps, " in line]) < 3:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
            if len(tables) == 1:
                counts.add_turn("fixed", 4, 4, 4)
                counts.publish(now=True)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(10) == 130 and "Traceback" not in rest, rest
    assert tables[0].startswith("0 windows")  # what was before it was called is not its time
    assert sum(int(line.split()[0]) for line in tables) >= 1


def test_watch_prints_no_json(url: str) -> None:
    result = CliRunner().invoke(group, ["explain", "--url", url, "--watch", "--json", "-"])
    assert result.exit_code == 2 and "leave out --json" in result.output


def test_several_engines_of_a_server(monkeypatch: pytest.MonkeyPatch, page: Page) -> None:
    """Their metrics have the same names, before anything is asked, too."""
    monkeypatch.setattr(metrics, "counts_page", lambda *_: page)
    monkeypatch.setattr(metrics, "REGISTRY", CollectorRegistry(auto_describe=True))
    for engine in range(2):
        metrics.WindowStatLogger(config(), engine)
    text = generate_latest(metrics.REGISTRY).decode()
    assert text.count("fusedstep:trace_info{") == 2


def test_no_windows_to_explain(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="yet: nothing has been asked"):
        explain(url)
    monkeypatch.setattr(metrics, "REGISTRY", CollectorRegistry())
    with pytest.raises(ConfigError, match="is it stock vLLM"):
        explain(url)
    with pytest.raises(ConfigError, match=r"no metrics at http://127.0.0.1:1/metrics"):
        explain("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("given", "url"),
    (
        ("http://h:1", "http://h:1/metrics"),
        ("http://h:1/v1/", "http://h:1/metrics"),
        ("http://h:1/metrics", "http://h:1/metrics"),
        ("https://h/proxy", "https://h/proxy/metrics"),
        ("http://h", "http://h/metrics"),
        ("h:1", "http://h:1/metrics"),
        ("h:1/v1", "http://h:1/metrics"),
        ("localhost", "http://localhost:8000/metrics"),
        ("8001", "http://127.0.0.1:8001/metrics"),
        ("[::1]:9", "http://[::1]:9/metrics"),
        ("a b", None),
        ("ftp://h", None),
        ("http://", None),
        ("h:99999", None),
        ("h:port", None),
        ("", None),
    ),
)
def test_how_a_server_may_be_named(given: str, url: str | None) -> None:
    if url is not None:
        assert metrics_url(given) == url
        return
    with pytest.raises(
        ConfigError, match=r"no server address: .* give http://HOST:PORT, HOST:PORT"
    ):
        metrics_url(given)


def test_host_and_port_or_a_port_will_do(url: str, page: Page) -> None:
    counted(page)
    address = url.removeprefix("http://")
    assert read(address) == read(address.rpartition(":")[2]) == read(url)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    (
        (404, b"", "the server has no metrics page: HTTP 404"),
        (200, b"\xff\xfe", r"\(no text\): is it vLLM\?"),
        (200, b"<html>no metrics</html>", "another kind|it is another server's page"),
        (200, b"# HELP x x\nx 1.0\n", "it is another server's page"),
        (0, b"", "is the server up"),  # it hangs up
    ),
)
def test_a_server_that_is_not_ours(status: int, body: bytes, words: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if status:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(ConfigError, match=words) as error:
            read(str(server.server_port))
    assert "\n" not in str(error.value)


def asked(app: Any, method: str = "GET", path: str = "/fusedstep/explain", root: str = "") -> Any:
    """What an ASGI app answers: status and the JSON of its body."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "root_path": root}
    asyncio.run(app(scope, None, send))
    return sent[0]["status"], json.loads(sent[1]["body"] or "null")


def test_the_route_adds_up_the_engines(
    monkeypatch: pytest.MonkeyPatch, page: Page, url: str, stat_logger: metrics.WindowStatLogger
) -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"status": 299})
        await send({"body": b""})

    route = ExplainRoute(inner)
    monkeypatch.setattr(metrics, "engines", [])
    status, body = asked(route)
    assert status == 404 and "FUSEDSTEP=on" in body["error"]
    metrics.engines.append(stat_logger)
    status, body = asked(route)
    assert status == 404 and "nothing has been asked" in body["error"]
    counted(page)
    assert asked(route) == (200, json.loads(json.dumps(read(url).as_dict())))
    metrics.engines.append(stat_logger)
    status, body = asked(route, path="/behind/a/proxy/fusedstep/explain", root="/behind/a/proxy")
    assert (status, body["windows"], body["lengths"]["64"]) == (200, 6, 6)
    assert body["one_step_turns"] == {"structured output": 2}
    assert asked(route, method="DELETE")[0] == 405
    assert asked(route, path="/v1/models") == (299, None)


def test_the_route_tells_of_its_own_engines_each_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two engines with counts of their own; another server has the same page names but for its."""
    monkeypatch.setattr(metrics, "engines", [])
    monkeypatch.setattr(metrics, "REGISTRY", CollectorRegistry())
    ours, other = (config(name=f"{tmp_path.name}-{name}") for name in ("ours", "other"))
    pages = [shared.counts_page(ours, n) for n in range(2)] + [shared.counts_page(other, 0)]
    try:
        for n, windows in enumerate((3, 5, 11)):
            counts = PublishedCounts(pages[n])
            for _ in range(windows):
                counts.add_turn("fixed", 8, 8 - n, 8)
            counts.publish(now=True)
        for n in range(2):
            metrics.WindowStatLogger(ours, n)
        status, body = asked(ExplainRoute(None))  # type: ignore[arg-type]
    finally:
        for each in pages:
            each.unlink()
    assert (status, body["windows"], body["steps"]) == (200, 3 + 5, 3 * 8 + 5 * 7)
    assert body["tokens"] == 8 * (3 + 5)


@pytest.mark.parametrize("stock", (False, True))
def test_the_server_gets_the_route(
    stock: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside the middleware that somebody names; vLLM's own server gets none."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # which vLLM would set
    (tmp_path / "config.json").write_text("{}")
    words = [str(tmp_path), "--middleware", "somebodys.Own"]
    args = server._parse(Options("auto"), stock, words)
    assert args.middleware == ["somebodys.Own", *([] if stock else [explain_route.OPTION])]
    module, _, name = explain_route.OPTION.rpartition(".")
    assert getattr(import_module(module), name) is ExplainRoute
