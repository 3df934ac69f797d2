"""``--speculative-config`` of ``verify`` and ``bench latency``: what engines do, and are asked."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
from tiny_commands import SMALL, run

from fusedstep.bench import latency, pair, verify
from fusedstep.bench.engine import EngineServer
from fusedstep.bench.prompts import Request
from fusedstep.errors import ConfigError
from fusedstep.options import Options

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
OPTIONS = Options.parse({})


class FakeEngine(contextlib.nullcontext[Any]):
    """Notes what it is asked. ``kind`` and its options tell the engines apart."""

    asked: list[tuple[str, bool, Any]] = []  # noqa: RUF012
    num_tokens: int | None = None  # of each answer; None: as many as asked

    def __init__(self, kind: str, _model: str, _options: Options, args: Any, *_: Any) -> None:
        super().__init__(self)
        self.kind, self.has_drafts = kind, "--speculative-config" in args

    def stop_clock(self) -> None:
        pass

    go_on = stop_clock

    def call(self, method: str, /, **given: Any) -> Any:
        if method == "num_drafts":
            return 3 * self.has_drafts
        if method == "accepted_share":
            return 0.75 if self.has_drafts else None
        if method == "rpc":
            stats = {"steps": 8, "windows": 1, "ops": "native", "loop": "eager"}
            stats["stock_steps"] = {"prefill": 3, "speculative decoding with dynamic lengths": 2}
            return stats if given["method"] == "window_stats" else 1.0
        self.asked.append((self.kind, self.has_drafts, given))
        if given.get("timing"):
            num_tokens = self.num_tokens or given["params"][0]["max_tokens"]
            seconds = num_tokens * {"stock": 0.4, "fusedstep": 0.2}[self.kind]
            return seconds / (1 + self.has_drafts), [(1,) * num_tokens for _ in given["prompts"]]
        done = {"token_ids": [1], "finish_reason": "stop", "logprobs": None}
        return [{"prompt": prompt, "completions": [done]} for prompt in given["prompts"]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, Any]]:
    for library in (latency, verify):
        monkeypatch.setattr(library, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "asked", [])
    return FakeEngine.asked


DRAFTS = ("--speculative-config", json.dumps(NGRAM))


@pytest.mark.parametrize("drafts", [(), DRAFTS], ids=["without", "with"])
def test_verify_keeps_its_logprobs_from_rounds(
    asked: list[tuple[str, bool, Any]], drafts: tuple[str, ...]
) -> None:
    """Those that judge a near-tie are stock's; a request that asks itself is asked so."""
    requests = [Request("a"), Request("b", {"logprobs": 1})]
    report = verify.verify("m", requests, 4, OPTIONS, "float32", drafts)
    of_kinds = {kind: [p.get("logprobs") for p in given["params"]] for kind, _, given in asked}
    assert of_kinds == {"stock": [2, 2], "fusedstep": [None if drafts else 2, 2]}
    assert report.num_drafts == (3 if drafts else 0)


def plan(**given: Any) -> latency.Plan:
    return latency.Plan(
        *((2,), (0.0,), 4, 8, 2, {}, False),
        **given,
    )


def test_latency_runs_all_prompts_and_an_engine_without_drafts(
    asked: list[tuple[str, bool, Any]],
) -> None:
    prompts = tuple(Request(text) for text in "abc")
    result = latency.measure("m", plan(prompts=prompts, without_drafts=True), OPTIONS, DRAFTS)
    engines = [("stock", True), ("fusedstep", True), ("fusedstep", False)]
    batches = [["a", "b"], ["c", "a"]]
    runs = [(*engine, prompts) for engine in engines for prompts in batches * 2]
    warm_up = [(*engine, prompts) for engine in engines for prompts in batches * 3]
    assert [(kind, drafts, given["prompts"]) for kind, drafts, given in asked] == (
        warm_up + runs * 2
    )
    [stock, ours], [plain] = result.rows, result.plain
    times = [row.ms_per_step.p50 for row in (stock, ours, plain)]
    assert times == pytest.approx([200, 100, 200])  # of a token of each request
    assert result.env["accepted_drafts"] == {"stock": 0.75, "fusedstep": 0.75}
    assert result.as_dict()["plain"][0]["engine"] == "fusedstep"


def test_prompts_that_do_not_fit_are_told(
    asked: list[tuple[str, bool, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "num_tokens", 3)
    with pytest.raises(ConfigError, match="--output-len 2 do not fit into the model's context"):
        latency.measure("m", plan(prompts=(Request("a"),)), OPTIONS, DRAFTS)


def test_drafts_are_counted() -> None:
    """As vLLM counts them: 2 + 0 + 3 of 9 hold."""
    metrics = SimpleNamespace(num_draft_tokens=9, histogram=[1, 0, 1, 1])
    outputs = [
        SimpleNamespace(outputs=[SimpleNamespace(spec_decode_metrics=m, token_ids=[1])])
        for m in (metrics, None)
    ]
    server = EngineServer()
    server.adapters = ()
    server.llm = SimpleNamespace(generate=lambda *_, **__: outputs)
    assert server.accepted_share() is None
    server.generate([[1]] * 2, [{}] * 2, timing=True)
    assert server.accepted_share() == pytest.approx(5 / 9)


@pytest.mark.exhaustive  # two engines of a minute
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "seeded"]
)
def test_verify(tmp_path: Path, sampling: dict[str, Any]) -> None:
    model = tiny_models.make("llama", tmp_path / "llama")
    prompts, report = tmp_path / "prompts.txt", tmp_path / "report.json"
    prompts.write_text("w17 w33 w700 w5 w17 w33 w700 w5\n" * 3)
    args = ("--prompts", str(prompts), "--max-tokens", "48", "--json", str(report), *DRAFTS)
    done = run("verify", model, *args, "--sampling", json.dumps(sampling), *SMALL)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(report.read_text())
    assert result["requests"] == 3 and result["different"] == 0 and result["num_drafts"] == 3
    assert result["steps_per_window_mean"] > 1.5
    assert set(result["stock_steps"]) == {"prefill"}


@pytest.mark.exhaustive  # two servers of a minute
def test_bench_serve(tmp_path: Path) -> None:
    """Servers with the same drafter give the same answers. The model drafts for itself, so that all
    drafts hold but those behind a request's end."""
    model, report = tiny_models.make("llama", tmp_path / "llama"), tmp_path / "serve.json"
    draft = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
    load = ("--num-prompts", "6", "--input-len", "9", "--output-len", "48", "--concurrency", "3")
    args = (*load, "--repeats", "1", "--speculative-config", json.dumps(draft))
    done = run("bench", "serve", model, *args, "--json", str(report), "--dtype=float32", *SMALL)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(report.read_text())
    assert result["ratios"][0]["same_texts"] == [6, 6]
    stock, ours = (row["accepted_drafts"][0] for row in result["rows"])
    assert 0.8 < stock == pytest.approx(ours, abs=0.1)


@pytest.mark.exhaustive  # three engines of a minute
def test_bench_latency(tmp_path: Path) -> None:
    """Greedy tokens are equal, and about 70 % of the drafts hold."""
    pair.make(tmp_path)
    draft = {"method": "draft_model", "model": str(tmp_path / "draft")}
    config = json.dumps(draft | {"num_speculative_tokens": 3})
    lengths = ("--batch-size", "2", "--temperature", "0", "--output-len", "128", "--repeats", "2")
    args = (*lengths, "--speculative-config", config, "--without-drafts", "--skip-tokenizer-init")
    report = tmp_path / "latency.json"
    model = str(tmp_path / "target")
    done = run("bench", "latency", model, *args, "--json", str(report), "--dtype=float32", *SMALL)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(report.read_text())
    assert [row["same_tokens"] for row in result["rows"] + result["plain"]] == [True] * 3
    for share in result["env"]["accepted_drafts"].values():
        assert 0.6 < share < 0.8
    assert set(result["env"]["stock_steps"]) == {"prefill"}
