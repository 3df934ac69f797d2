"""``fusedstep bench serve`` without servers: vLLM's JSON, ratios, the table, and wrong usage."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fusedstep.bench import server, serving
from fusedstep.bench.progress import Progress
from fusedstep.bench.serving_result import Quantiles, Result, Row, Run, Spread, chunk_gaps_ms
from fusedstep.cli.main import group
from fusedstep.errors import ConfigError, FusedStepError
from fusedstep.options import Options

RECORDED = Path(__file__).with_name("bench_serve.json")  # vLLM 0.32's, of four requests
Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run ``fusedstep bench serve`` in this process: exit code, stdout, stderr."""

    def invoke(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            group.main(["bench", "serve", *args], prog_name="fusedstep")
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return invoke


@pytest.fixture
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


def run_of(**fields: Any) -> Run:
    times = dict.fromkeys(("ttft_ms", "tpot_ms", "itl_ms", "chunk_ms", "e2el_ms"), (2.0, 4.0))
    rates = {"output_tokens_per_s": 100.0, "requests_per_s": 2.0, "tokens_per_chunk": 1.0}
    return Run(**{**times, **rates, "output_tokens": 64, "failed": 0, **fields})


def row_of(engine: Any, *runs: Run, rate: float = 2.0, concurrency: float = math.inf) -> Row:
    return Row.of(engine, rate, concurrency, list(runs))


def result_of(stock: Row, ours: Row, *, same_work: bool = True) -> Result:
    env = {"model": "m", "device": "d", "decode_steps": "auto", "dataset": "random"}
    return Result(env | {"vllm": "0", "repeats": 1}, [stock, ours], same_work)


def test_a_recorded_run_is_parsed(recorded: dict[str, Any]) -> None:
    """By hand: this file is of ``bench serve`` against fusedstep, whose chunks hold windows."""
    run = Run.parse(recorded)
    assert (run.failed, run.output_tokens) == (0, sum(recorded["output_lens"]))
    assert run.ttft_ms == (recorded["p50_ttft_ms"], recorded["p99_ttft_ms"])
    assert run.itl_ms == (recorded["p50_itl_ms"], recorded["p99_itl_ms"])
    assert run.chunk_ms == pytest.approx(run.itl_ms)  # no two events arrived together
    chunks = sum(len(gaps) + 1 for gaps in recorded["itls"])
    assert run.tokens_per_chunk == run.output_tokens / chunks > 1
    spent = [sum(gaps) for gaps in recorded["itls"]]
    per_token = [t / (n - 1) for t, n in zip(spent, recorded["output_lens"], strict=True)]
    assert min(per_token) <= run.tpot_ms[0] / 1e3 <= max(per_token)
    assert run.tpot_ms[0] < run.itl_ms[0]


def test_failed_requests_give_no_chunks(recorded: dict[str, Any]) -> None:
    whole = Run.parse(recorded)
    recorded["errors"][0] = "cut off"
    recorded["itls"][0] = [100.0]
    recorded["failed"] = 1
    run = Run.parse(recorded)
    assert run.failed == 1
    assert run.chunk_ms[1] <= 2 * whole.chunk_ms[1]


def test_nothing_answered_is_no_error(recorded: dict[str, Any]) -> None:
    recorded |= {"errors": ["no"], "itls": [[]], "failed": 1, "total_output_tokens": 0}
    for name in ("start_times", "ttfts", "latencies", "output_lens", "generated_texts"):
        del recorded[name][1:]
    assert Run.parse(recorded).chunk_ms == (0, 0)


@pytest.mark.parametrize("change", ({"itls": None}, {"p99_tpot_ms": "?"}, {"errors": []}))
def test_another_json_is_named(recorded: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(FusedStepError, match="wrote a JSON that we do not know"):
        Run.parse(recorded | change)


@pytest.mark.parametrize(
    ("gaps", "chunks"),
    (
        ([], []),
        ([0.02, 0.03], [20, 30]),
        ([0.02, 0.00002, 0.00003, 0.03], [20, 30.05]),
        ([0.00002], []),
    ),
)
def test_events_that_arrive_together_are_one_chunk(gaps: list[float], chunks: list[float]) -> None:
    assert chunk_gaps_ms(gaps) == pytest.approx(chunks)


def test_figures_are_medians_over_repeats() -> None:
    runs = [run_of(ttft_ms=(x, 10 * x), output_tokens_per_s=x) for x in (3.0, 1.0, 8.0)]
    row = row_of("stock", *runs)
    assert row.ttft_ms == Quantiles(Spread(3, 1, 8), Spread(30, 10, 80))
    assert row.output_tokens_per_s == Spread(3, 1, 8)
    assert row.output_tokens == (64, 64, 64)


def test_ratios_are_ours_to_stock() -> None:
    stock = row_of("stock", run_of())
    ours = row_of("fusedstep", run_of(ttft_ms=(1.0, 6.0), output_tokens_per_s=150.0))
    (found,) = result_of(stock, ours).as_dict()["ratios"]
    assert found["ttft_ms"] == {"p50": 0.5, "p99": 1.5}
    assert found["output_tokens_per_s"] == 1.5
    assert (found["rate"], found["concurrency"], found["why_none"]) == (2, "inf", None)


@pytest.mark.parametrize(
    ("change", "same_work", "why"),
    (
        ({"failed": 1}, True, "0 and 1 failed"),
        ({"output_tokens": 63}, True, "numbers of tokens differ"),
        ({"output_tokens": 63}, False, None),
    ),
)
def test_no_ratio_of_what_is_not_the_same(
    change: dict[str, Any], same_work: bool, why: str | None
) -> None:
    stock, ours = row_of("stock", run_of()), row_of("fusedstep", run_of(**change))
    (found,) = result_of(stock, ours, same_work=same_work).as_dict()["ratios"]
    assert found["why_none"] == why
    assert found["ttft_ms"]["p50"] == (1 if why is None else None)
    assert found["tokens_per_chunk"] == (1 if why is None else None)


def test_no_ratio_to_nothing() -> None:
    """One token a request has no TPOT: vLLM's figure is 0 then."""
    row = row_of("stock", run_of(tpot_ms=(0.0, 0.0)))
    (found,) = result_of(row, replace(row, engine="fusedstep")).as_dict()["ratios"]
    assert found["tpot_ms"] == {"p50": None, "p99": None}


@pytest.mark.parametrize(("temperature", "same"), [(0, (1, 2)), (0.5, None)])
def test_greedy_answers_are_compared(
    recorded: dict[str, Any],
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
    same: tuple[int, int] | None,
) -> None:
    """The same repeat's, one by one; beside them the share of the drafts that held."""
    monkeypatch.setenv("COLUMNS", "160")
    names = ("start_times", "ttfts", "latencies", "output_lens", "errors", "itls")
    short = {name: recorded[name][:2] for name in names}
    share = {"spec_decode_acceptance_rate": 62.5}
    runs = [
        Run.parse(recorded | short | share | {"generated_texts": texts})
        for texts in (["a", "b"], ["a", "c"])
    ]
    result = result_of(row_of("stock", runs[0]), row_of("fusedstep", runs[1]))
    result.env["temperature"] = temperature
    found = result.as_dict()
    assert found["ratios"][0]["same_texts"] == same
    assert [row["accepted_drafts"] for row in found["rows"]] == [(0.625,)] * 2
    monkeypatch.setattr(serving, "measure", lambda *_: result)
    _, out, _ = invoke()
    assert ("1 of 2" in out) == (same is not None) and out.count("62.5 %") == 2


@pytest.mark.parametrize(
    ("dtype", "theirs", "why"),
    (
        ("float32", ["a", "c"], "1 of 2 texts differ"),
        ("auto", ["a", "c"], None),  # a near-tie may fall to either side
        ("auto", ["c", "d"], "2 of 2 texts differ"),
        ("float32", ["a", "b"], None),
    ),
)
def test_a_server_with_other_answers_has_no_ratio(
    recorded: dict[str, Any],
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    theirs: list[str],
    why: str | None,
) -> None:
    """It is said, and the exit code is 1."""
    monkeypatch.setenv("COLUMNS", "160")
    names = ("start_times", "ttfts", "latencies", "output_lens", "errors", "itls")
    short = {name: recorded[name][:2] for name in names}
    runs = [Run.parse(recorded | short | {"generated_texts": t}) for t in (["a", "b"], theirs)]
    result = result_of(row_of("stock", runs[0]), row_of("fusedstep", runs[1]))
    result.env.update(temperature=0, dtype=dtype)
    monkeypatch.setattr(serving, "measure", lambda *_: result)
    code, out, _ = invoke()
    (found,) = result.as_dict()["ratios"]
    assert (code, found["why_none"]) == (0 if why is None else 1, why)
    assert (found["ttft_ms"]["p50"] is None) == (why is not None) == ("texts differ" in out)


def test_rows_in_json() -> None:
    rows = (row_of("stock", run_of(), rate=math.inf, concurrency=16), row_of("fusedstep", run_of()))
    plain = json.loads(json.dumps(result_of(*rows).as_dict(), allow_nan=False))
    row = plain["rows"][0]
    assert (row["engine"], row["rate"], row["concurrency"]) == ("stock", "inf", 16)
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "chunk_ms", "e2el_ms"):
        assert row[name] == {"p50": 2, "p99": 4}
        assert row["spread"][name] == {"p50": [2, 2], "p99": [4, 4]}
    assert (row["output_tokens_per_s"], row["failed"]) == (100, 0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ``measure`` is called with, in place of servers; it gives a result of one load."""
    seen: list[Any] = []
    rows = row_of("stock", run_of()), row_of("fusedstep", run_of(output_tokens_per_s=120.0))

    def measure(*given: Any) -> Result:
        seen.append(given)
        return result_of(*rows)

    monkeypatch.setattr(serving, "measure", measure)
    return seen


def test_options_are_ours_or_vllms(invoke: Invoke, measured: list[Any]) -> None:
    args = ("m", "--rate", "0.5,inf", "--concurrency=4,inf", "--dtype", "float32")
    assert invoke(*args, "--decode-steps", "4")[0] == 0
    plan, options, vllm_args, _ = measured[0]
    assert plan.loads == [(0.5, 4), (0.5, math.inf), (math.inf, 4), (math.inf, math.inf)]
    assert str(options.decode_steps) == "4"
    assert vllm_args == ("m", "--dtype", "float32")


def test_table(invoke: Invoke, measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = invoke()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    table = {cells[2]: cells for cells in lines if len(cells) == 6}
    assert code == 0
    assert table["TTFT p50"] == ["2", "inf", "TTFT p50", *["2.00 (2.00-2.00)"] * 2, "1.00"]
    assert table["output tokens/s"][-1] == "1.20"
    assert {
        f"{n} {q}" for n in ("TTFT", "TPOT", "ITL", "chunk gap", "E2EL") for q in ("p50", "p99")
    }
    assert table["failed requests"][3:5] == ["0", "0"]


def test_failed_requests_show_and_exit_with_1(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = row_of("stock", run_of(failed=2)), row_of("fusedstep", run_of())
    monkeypatch.setattr(serving, "measure", lambda *_: result_of(*rows))
    code, out, _ = invoke()
    assert code == 1
    assert "2 and 0 failed" in out and "1.00 │" not in out


def test_json_instead_of_the_table(invoke: Invoke, measured: list[Any]) -> None:
    code, out, _ = invoke("--json", "-")
    assert code == 0
    assert set(json.loads(out)) == {"complete", "env", "rows", "ratios"}


@pytest.mark.parametrize(
    ("args", "words"),
    (
        pytest.param(("--rate", "0"), "numbers above 0 or inf", id="rate 0"),
        pytest.param(("--rate", "fast"), "numbers above 0 or inf", id="rate"),
        pytest.param(("--rate", "nan"), "numbers above 0 or inf", id="rate nan"),
        pytest.param(("--concurrency", "1.5"), "whole numbers above 0", id="concurrency"),
        pytest.param(("--concurrency", "-4"), "whole numbers above 0", id="below 0"),
        pytest.param(("--dataset", "sharegpt"), "sharegpt", id="dataset"),
        pytest.param(("--dataset", "file"), "--dataset-path", id="no path"),
        pytest.param(("--dataset-path", "x"), "--dataset file", id="no dataset"),
        pytest.param(("--repeats", "0"), "--repeats", id="repeats"),
        pytest.param(("--num-prompts", "0"), "--num-prompts", id="prompts"),
        pytest.param(("--temperature", "-1"), "--temperature", id="temperature"),
        pytest.param(("--port", "8000"), "--port is chosen here", id="port"),
        pytest.param(("--host=0.0.0.0",), "--host is chosen here", id="host"),
        pytest.param(("--decode-steps", "0"), "--decode-steps must be", id="decode steps"),
        pytest.param(("--temperature", "nan"), "--temperature", id="temperature nan"),
        pytest.param(("--output-len", "9000"), "--output-len 9000: 9128 tokens", id="context"),
        pytest.param(
            ("--output-len=128", "--max-model-len=255"), "context of 255", id="given context"
        ),
        pytest.param(("--concurency=4",), "did you mean --concurrency?", id="mistyped"),
        pytest.param(("no/such/folder",), "no model at no/such/folder", id="folder"),
        pytest.param(("--json", "no/such/x.json"), "cannot write", id="json"),
        pytest.param(
            ("--dataset", "file", "--dataset-path", "no-such-file"), "cannot read", id="no file"
        ),
    ),
)
def test_wrong_usage_is_one_line(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], words: str
) -> None:
    def start(*_: Any) -> None:
        pytest.fail("a server was started")

    monkeypatch.setattr(server.Server, "__init__", start)
    code, out, err = invoke(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err


def plan_of(**fields: Any) -> serving.Plan:
    loads = {"rates": (math.inf,), "concurrencies": (16.0,), "dataset": "random", "path": None}
    lengths = {"input_len": 8, "output_len": 9, "num_prompts": 3, "repeats": 1, "temperature": 0}
    return serving.Plan(**{**loads, **lengths, **fields})


class FakeServer(contextlib.nullcontext[Any]):
    """Up at once."""

    started: ClassVar[list[str]] = []

    def __init__(self, kind: str, *_: Any) -> None:
        super().__init__(self)
        self.kind = kind
        self.started.append(kind)

    def wait_until_up(self) -> None:
        pass

    stop_clock = go_on = wait_until_up


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which servers were started, in place of real ones: their context has 20 tokens."""
    monkeypatch.setattr(FakeServer, "started", [])
    monkeypatch.setattr(serving, "Server", FakeServer)
    monkeypatch.setattr(serving, "_card", lambda _: {"root": "m", "max_model_len": 20})
    monkeypatch.setattr(serving.Load, "run", lambda *_, **__: run_of())
    return FakeServer.started


def test_every_load_is_kept(started: list[str]) -> None:
    kept: list[dict[str, Any]] = []
    said: list[str] = []
    plan = plan_of(rates=(1.0, math.inf), repeats=2)
    measured = serving.measure(plan, Options.parse({}), ("m",), Progress(said.append, kept.append))
    assert [len(result["rows"]) for result in kept] == [2, 4]
    assert kept[-1] == measured.as_dict() and kept[0]["env"]["model"] == "m"
    assert sum("repeat" in words for words in said) == 8 and started == ["stock", "fusedstep"]


@pytest.mark.parametrize("args", (("--dtype", "float32"), ("--dtype=float32",), ()), ids=" ".join)
def test_a_server_that_gives_another_text(
    started: list[str],
    recorded: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
) -> None:
    def run(_: Any, server: FakeServer, *__: Any, **___: Any) -> Run:
        texts = list(recorded["generated_texts"])
        texts[-1] += "!" if server.kind == "fusedstep" else ""
        return Run.parse(recorded | {"generated_texts": texts})

    monkeypatch.setattr(serving.Load, "run", run)
    found = serving.measure(plan_of(), Options.parse({}), ("m", *args))
    assert found.comparable == (not args)
    assert found.as_dict()["ratios"][0]["same_texts"] == (3, 4)


def test_what_only_the_server_knows_of_its_context_is_asked_first(started: list[str]) -> None:
    with pytest.raises(ConfigError, match="21 tokens do not fit into the model's context of 20"):
        serving.measure(plan_of(input_len=12), Options.parse({}), ("m",))
    assert started == ["stock"]


def test_a_file_needs_pandas(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's tool would say so after the start of a server, in other words."""
    monkeypatch.setattr(serving, "find_spec", lambda _: None)
    path = tmp_path / "prompts.txt"
    path.write_text("one\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="pip install pandas"):
        serving.measure(plan_of(dataset="file", path=path), Options.parse({}), ("m",))
    assert started == []


def test_a_file_becomes_vllms_custom_dataset(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('one\n\n"two" \u00e9\n', encoding="utf-8")
    load = serving.Load(plan_of(dataset="file", path=path), (), tmp_path)
    made = tmp_path / "prompts.jsonl"
    assert [json.loads(line)["prompt"] for line in made.read_text().splitlines()] == [
        "one",
        '"two" \u00e9',
    ]
    assert {"--dataset-name=custom", f"--dataset-path={made}", "--output-len=9"} <= {*load.args}
    assert not [arg for arg in load.args if arg.startswith("--input-len")]


def test_the_tool_finds_the_tokenizer_of_the_server(tmp_path: Path) -> None:
    vllm_args = ("m", "--tokenizer", "t", "--dtype", "float32", "--trust-remote-code")
    load = serving.Load(plan_of(), (*vllm_args, "--tokenizer-mode=slow"), tmp_path)
    given = ["--tokenizer", "t", "--trust-remote-code", "--tokenizer-mode=slow"]
    assert [arg for arg in load.args if arg in given] == given
    assert "float32" not in load.args
