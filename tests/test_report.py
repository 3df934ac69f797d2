"""``bench ... --html``: one page, whose pictures show what ``--json`` says."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fusedstep.bench import latency, report, serving
from fusedstep.bench.latency import Row
from fusedstep.bench.serving_result import Result, Run
from fusedstep.bench.serving_result import Row as Served
from fusedstep.bench.spread import Spread
from fusedstep.cli.main import group

RECORDED = Path(__file__).with_name("bench_serve.json")  # vLLM 0.32's, of four requests
NASTY = "</script><script>alert(1)</script>&"
ENV = {"model": NASTY, "device": "d", "decode_steps": "auto", "vllm": "0"}
ENV |= {"ops": "native", "loop": "eager", "options": ["--dtype", "float32", "--tag", "a b"]}


class Page(HTMLParser):
    """The page as a browser reads it: its headings, its scripts, where it looks for more."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.setdefault(self.tags[-1], []).append(data)

    @property
    def figures(self) -> list[dict[str, Any]]:
        """The data in the page: its second script."""
        (data,) = (t for t in self.texts["script"] if t.startswith('[{"traces"'))
        found: list[dict[str, Any]] = json.loads(data)
        return found

    def titled(self, title: str) -> dict[str, Any]:
        titles = [text for text in self.texts["h2"] if text.strip()]
        return self.figures[titles.index(title)]


def latency_result(*, same: bool = True) -> latency.Result:
    rows = []
    for batch_size in (1, 8):
        for engine in latency.KINDS:
            times = [batch_size + n + (engine == "stock") for n in range(3)]
            spread = Spread.of([float(t) for t in times])
            tokens = 1e3 * batch_size / spread.p50
            rows.append(
                Row(engine, batch_size, 0.0, spread, tokens, 0.1, same, tuple(map(float, times)))
            )
    return latency.Result(ENV, rows, {"stock": 1.0, "fusedstep": 1.0})


def serving_result() -> Result:
    recorded = json.loads(RECORDED.read_text("utf-8"))
    failed = {**recorded, "errors": ["x", "", "", ""], "failed": 1}
    runs = [Run.parse(recorded), Run.parse(failed)]
    rows = [Served.of(kind, float("inf"), 4.0, runs) for kind in latency.KINDS]
    return Result(ENV | {"dataset": "random", "repeats": 2}, rows, same_work=True)


def test_pictures_of_latency_show_what_json_says() -> None:
    result = latency_result()
    plain = json.loads(json.dumps(result.as_dict()))
    page = Page(report.of_latency(result))
    boxes = page.titled("Time per decode step")["traces"]
    assert [(box["name"], box["y"]) for box in boxes] == [
        (row["engine"], row["repeats_ms"]) for row in plain["rows"]
    ]
    lines = {t["name"]: t for t in page.titled("Throughput over batch size")["traces"]}
    for engine in latency.KINDS:
        rows = [row for row in plain["rows"] if row["engine"] == engine]
        line = lines[f"{engine}, temperature 0"]
        assert line["x"] == [1, 8]
        assert line["y"] == [row["tokens_per_s"] for row in rows]
        for n, row in enumerate(rows):
            most = 1e3 * row["batch_size"] / row["ms_per_step"]["min"]
            assert line["y"][n] + line["error_y"]["array"][n] == pytest.approx(most)


def test_pictures_of_serving_show_what_json_says() -> None:
    result = serving_result()
    recorded = json.loads(RECORDED.read_text("utf-8"))
    page = Page(report.of_serving(result))
    boxes = page.titled("TTFT of each request")["traces"]
    want = [1e3 * t for t in recorded["ttfts"]]
    assert [box["y"] for box in boxes] == [want + want[1:]] * 2  # the one that failed has none
    for name in ("TPOT", "E2EL"):
        assert len(page.titled(f"{name} of each request")["traces"]) == 2
    bars = page.titled("Throughput over the load")["traces"]
    rates = [row["output_tokens_per_s"] for row in result.as_dict()["rows"]]
    assert [bar["y"] for bar in bars] == [[rate] for rate in rates]
    first, rest = page.titled("Requests: stock, inf requests/s, 4 at once")["traces"]
    assert len(first["y"]) == 4 and min(first["base"]) == 0
    for n, whole in enumerate(recorded["latencies"]):
        assert first["x"][n] + rest["x"][n] == pytest.approx(whole)
        assert rest["base"][n] == pytest.approx(first["base"][n] + first["x"][n])


@pytest.mark.parametrize("text", (report.of_latency, report.of_serving), ids=("latency", "serve"))
def test_a_page_needs_nothing_and_lets_nothing_in(text: Any) -> None:
    result: Any = latency_result() if text is report.of_latency else serving_result()
    page = Page(text(result))
    assert page.links == [] and page.tags.count("script") == 3
    assert any(NASTY in cell for cell in page.texts["td"]), page.texts["td"]
    assert "--dtype float32 --tag 'a b'" in page.texts["td"]
    assert any("Plotly.newPlot" in script for script in page.texts["script"])
    assert page.tags.count("div") == len(page.figures)
    for figure in page.figures:  # a title of another form is not drawn
        axes = [figure["layout"][name] for name in ("xaxis", "yaxis") if name in figure["layout"]]
        assert axes and all(set(axis["title"]) == {"text"} for axis in axes)
        assert sum(t.get("showlegend", True) for t in figure["traces"]) == 2


def test_text_in_the_data_ends_no_script() -> None:
    trace = {"type": "bar", "name": NASTY, "y": [1]}
    page = Page(report._page("t", {}, [report.Figure("f", "", [trace], {})], []))
    assert page.tags.count("script") == 3 and page.figures[0]["traces"][0]["name"] == NASTY


def test_no_picture_hides_that_outputs_differ() -> None:
    texts = Page(report.of_latency(latency_result(same=False))).texts
    assert "Outputs differ at batch 1, batch 8: no speed-up." in texts["strong"]


def test_commands_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "measure", lambda *_: latency_result())
    monkeypatch.setattr(serving, "measure", lambda *_: serving_result())
    for command, code in (("latency", 0), ("serve", 1)):
        file = tmp_path / f"{command}.html"
        result = CliRunner().invoke(group, ["bench", command, "m", "--html", str(file)])
        assert result.exit_code == code, result.output
        assert f"fusedstep bench {command}" in Page(file.read_text("utf-8")).texts["title"]


@pytest.mark.parametrize("command", ("latency", "serve"))
def test_what_is_missing_is_said_before_the_work(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any) -> None:
        pytest.fail("measured")

    monkeypatch.setattr(latency, "measure", measure)
    monkeypatch.setattr(serving, "measure", measure)
    args = ["bench", command, "m", "--html"]
    result = CliRunner().invoke(group, [*args, "no/such/x.html"])
    assert result.exit_code == 2 and "name another file after --html" in result.stderr
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    result = CliRunner().invoke(group, [*args, "x.html"])
    assert result.exit_code == 2 and "pip install plotly" in result.stderr
    assert result.stderr.count("\n") == 1
