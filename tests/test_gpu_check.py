"""``bench.gpu_check`` without vLLM: order and time, what fails, the report, wrong usage."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_engine import FACTS, PLAN, VOCAB, Clock, FakeEngine

from fusedstep.bench.gpu_check import __main__ as gpu_check
from fusedstep.bench.gpu_check import budget as gpu_budget
from fusedstep.bench.gpu_check import device as gpu_device
from fusedstep.bench.gpu_check import equality as gpu_equality
from fusedstep.bench.gpu_check import models as gpu_models
from fusedstep.bench.gpu_check import report as gpu_report
from fusedstep.bench.gpu_check import run as gpu_run
from fusedstep.bench.gpu_check.measure import OURS, Pair, Plan, Start
from fusedstep.errors import FusedStepError
from fusedstep.options import Options

Run = Callable[..., gpu_report.Report]
Commands = dict[str, Any]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    monkeypatch.setattr(FakeEngine, "seen", [], raising=False)
    return []


@pytest.fixture
def run(engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A check with fake engines; keywords change the plan, ``behaviour`` the engines."""

    def run(json_path: str | None = None, **changes: Any) -> gpu_report.Report:
        clock = Clock()
        for name, value in changes.pop("behaviour", {}).items():
            monkeypatch.setattr(FakeEngine, name, value)

        def open_engine(kind: str, model: str, options: Options, args: Any) -> FakeEngine:
            engines.append(FakeEngine(kind, clock, options.loop))
            return engines[-1]

        def open_pair(model: gpu_models.Model, plan: Plan, how: Start) -> Pair:
            assert how.as_served or how.loop == "eager"
            assert how.seconds is not None and how.seconds > 0
            return Pair(model, plan, how, open_engine)

        plan = replace(PLAN, **changes)
        said: list[str] = []
        return gpu_run.Check(plan, json_path, said.append, open_pair, clock).run()

    return run


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """What processes beside the engines print, by the last word of their command; or an error."""
    loop_cost = json.dumps({"while": {"p50": 5.0}, "eager": "no"})
    answers: Commands = dict.fromkeys(gpu_device.CHECKS, "") | {gpu_run.LOOP_COST[-1]: loop_cost}

    def in_a_process(command: tuple[str, ...], seconds: float) -> str:
        assert 0 < seconds <= 120
        assert command[-1] not in gpu_device.CHECKS or not FakeEngine.seen  # they come first
        found = answers[command[-1]]
        if isinstance(found, Exception):
            raise found
        return str(found)

    monkeypatch.setattr(gpu_run, "_in_a_process", in_a_process)
    return answers


def test_a_whole_run(run: Run, engines: list[FakeEngine], tmp_path: Path) -> None:
    report = run(str(tmp_path / "result.json"))
    assert all(engine.closed for engine in engines) and len(engines) == 2
    written = json.loads((tmp_path / "result.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert written == json.loads(json.dumps(report.as_dict()))
    names = "complete equal device forms rows targets loop_cost_us loop_cost_reason env skipped"
    assert set(written) == set(names.split()) and written["equal"] is True
    assert written["complete"] is True
    assert list(written["forms"]) == ["while", "eager"] and written["skipped"] == []
    assert written["device"] == {}  # a CPU has nothing of it
    requests = sum(len(b.prompts) for b in gpu_equality.equality_batches(VOCAB, 4, 5)) + 2 * (
        PLAN.repeats + 1
    ) * sum(PLAN.batch_sizes)
    assert written["forms"]["while"] == {
        "ran": "while",
        "reason": "works here",
        "equal": True,
        "requests": requests,
        "near_ties": 0,
        "differences": [],
    }
    assert [(row["form"], row["batch_size"], row["temperature"]) for row in written["rows"]] == [
        (form, size, temperature)
        for form in PLAN.forms
        for size in PLAN.batch_sizes
        for temperature in PLAN.temperatures
    ]
    for row in written["rows"]:
        assert row["equal"] and row["ratio"] == pytest.approx(2)
        assert row["stock"]["ms_per_step"]["p50"] == pytest.approx(2000)
        assert row["stock"]["host_ms_per_step"] is None
        assert row["stock"]["idle_by"] == "time in no forward"
    assert written["loop_cost_us"] is None and written["loop_cost_reason"] == "needs CUDA"
    assert {target["reached"] for target in written["targets"]} == {None}
    assert {"device", "torch", "vllm", "git_sha", "python", "plan"} <= set(written["env"])
    assert written["env"]["engines"]["tiny"] == {"stock": FACTS, "fusedstep": FACTS}


def test_the_simplest_form_is_compared_first_and_the_best_measured_first(run: Run) -> None:
    run()
    forms = [form for kind, form in FakeEngine.seen if kind == OURS]
    assert list(dict.fromkeys(forms)) == ["eager", "while"]
    assert forms[-1] == "eager" and forms[len(forms) // 2] == "while"


def test_a_gpu_run_has_host_times_traces_and_targets(run: Run, commands: Commands) -> None:
    report = run(device="cuda", models=("qwen3-0.6b",))
    assert report.equal and report.loop_cost_us is not None
    assert report.device == {check.what: "works" for check in gpu_device.CHECKS.values()}
    for row in report.rows:
        assert row.fusedstep.host_ms_per_step is not None
        traced = (row.stock.idle_share, row.fusedstep.idle_share)
        assert traced == ((0.4, 0.01) if row.temperature == 0 else (None, None))
    reached = {target["target"]: target["reached"] for target in report.targets()}
    assert reached == {
        "qwen3-0.6b batch 1: ratio to stock >= 1.8": True,
        "qwen3-0.6b batch 64: ratio to stock >= 1.6": None,
        "llama-3.2-1b batch 1: ratio to stock >= 1.4": None,
        "llama-3.1-8b batch 1: ratio to stock >= 1.05": None,
        "every point measured: ratio to stock >= 1": True,
        "every point traced: GPU idle share < 0.03": True,
        "qwen3-0.6b batch 1: ms per step <= 0.8": False,
    }


def test_no_target_is_reached_against_another_stock(
    run: Run, capsys: pytest.CaptureFixture[str], commands: Commands
) -> None:
    facts = FACTS | {"decode_graphs": "PIECEWISE"}
    report = run(device="cuda", models=("qwen3-0.6b",), behaviour={"facts": facts})
    assert {target["reached"] for target in report.targets()} == {None}
    line = "qwen3-0.6b: stock ran with decode_graphs PIECEWISE, not FULL"
    assert report.as_dict()["env"]["stock_lacks"] == [line]
    gpu_report.print_report(report)
    out = capsys.readouterr().out
    assert line in out and "loop alone, while: 5.0 us per step" in out and "40.0%" in out


def test_another_token_is_found(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "MAX_DIFFERENCES", 20)
    report = run(behaviour={"wrong": ("while",)})
    assert not report.equal
    assert report.forms["while"].equal is False and report.forms["eager"].equal is True
    found = report.as_dict()["forms"]["while"]["differences"]
    assert len(found) == 20
    assert found[0]["model"] == "tiny" and found[0]["batch"] == "one greedy"
    assert (found[0]["at"], found[0]["verdict"]) == (4, "DIFFERENT")
    assert all(row.ratio is None for row in report.rows if row.form == "while")
    gpu_report.print_report(report)
    assert "outputs differ" in capsys.readouterr().out
    assert gpu_check._exit_code(report) == 1


def test_a_form_that_fails_is_left_out(run: Run) -> None:
    report = run(behaviour={"broken": ("while",)})
    assert not report.equal and report.forms["while"].equal is None
    assert report.forms["eager"].equal is True
    assert {row.form for row in report.rows} == {"eager"}
    assert "the fusedstep engine: no while" in {entry["reason"] for entry in report.skipped}


def test_engines_that_die_are_started_again_without_the_form(
    run: Run, engines: list[FakeEngine]
) -> None:
    report = run(behaviour={"deadly": ("while",)})
    assert len(engines) == 4 and all(engine.closed for engine in engines)
    assert report.forms["while"].equal is False
    assert report.forms["while"].reason == "tiny: the fusedstep engine died"
    assert report.forms["eager"].equal is True
    assert [row.form for row in report.rows] == ["eager"] * 4
    assert {entry["part"] for entry in report.skipped} == {"tiny: tokens of while"}


def test_engines_that_hang_are_killed(
    run: Run, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = threading.Event()
    monkeypatch.setitem(gpu_budget.LIMITS, "form", 0.05)
    monkeypatch.setattr(FakeEngine, "kill", lambda engine: killed.set())
    answer = FakeEngine.use_loop

    def use_loop(engine: FakeEngine, loop: str) -> dict[str, str]:
        if loop == "while":
            assert killed.wait(10)
            engine.dead = True
            raise FusedStepError("the fusedstep engine died")
        return answer(engine, loop)

    report = run(behaviour={"use_loop": use_loop})
    assert report.forms["while"].reason == "tiny: no answer in 0.05 s"
    assert report.forms["eager"].equal is True


def test_a_profiler_that_ends_the_engines_is_used_no_more(
    run: Run, engines: list[FakeEngine], commands: Commands
) -> None:
    def trace_kernels(engine: FakeEngine) -> None:
        engine.dead = True
        raise FusedStepError("the fusedstep engine died")

    report = run(device="cuda", behaviour={"trace_kernels": trace_kernels})
    assert len(engines) == 4 and report.equal and len(report.rows) == 8
    assert [entry["part"] for entry in report.skipped] == ["tiny: trace of while, batch 1"]


def test_on_further_models_times_come_first(run: Run, tmp_path: Path) -> None:
    path = gpu_models.load("tiny", tmp_path).path.rename(tmp_path / "other")
    report = run(models=("tiny", str(path)), repeats=1)
    assert len(report.rows) == 16 and not report.skipped
    forms = [form for kind, form in FakeEngine.seen if kind == OURS]
    assert [form for i, form in enumerate(forms) if forms[i - 1 : i] != [form]] == [
        "eager",  # the first model's tokens
        "while",  # its tokens and times
        "eager",
        "while",  # the other's times
        "eager",
        "while",  # its tokens
        "eager",
    ]


def test_what_does_not_fit_is_skipped_and_said(run: Run) -> None:
    report = run(minutes=2.0, behaviour={"seconds_per_call": 3.0})
    assert report.equal  # of highest value, so first
    assert 0 < len(report.rows) < 8
    assert {entry["reason"] for entry in report.skipped} == {"no time left of 2 minutes"}
    parts = [entry["part"] for entry in report.skipped]
    assert parts[-1] == "tiny: eager, batch 2, temperature 1"
    assert len(parts) + len(report.rows) >= 8


def test_without_time_nothing_starts(run: Run, engines: list[FakeEngine]) -> None:
    report = run(minutes=0.5)
    assert not engines and not report.equal and not report.rows
    assert [entry["part"] for entry in report.skipped] == ["tiny: engines for while, eager"]


def main(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(gpu_check.sys, "argv", ["gpu_check", *args])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--forms", "while,loop"), "--forms: use auto, while, unrolled, replay, eager"),
        (("--forms", ","), "--forms: use auto"),
        (("--batch-sizes", "1,x"), "--batch-sizes: want numbers from 1 to 256"),
        (("--batch-sizes", "512"), "--batch-sizes: want numbers from 1 to 256"),
        (("--models", "nonsense"), "no model nonsense: use qwen3-0.6b"),
        (("--models", "tiny,tiny"), "--models: two of the same name"),
        (("--tiny", "--models", "tiny"), "leave --models out"),
        (("--repeats", "0"), "--repeats"),
        (("--minutes", "0"), "--minutes"),
        (("--minutes", "-3"), "--minutes"),
        (("--minutes", "nan"), "--minutes: want a number up to 1440, not nan"),
        (("--minutes", "inf"), "--minutes: want a number up to 1440, not inf"),
        (("--json", "no/such/folder/x.json"), "cannot write no/such/folder/x.json"),
        pytest.param(
            ("--device", "cuda"),
            "torch sees no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_one_line(
    args: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_check.wiring, "is_cpu_build", lambda: True)
    assert main(monkeypatch, "--device", "cpu", *args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert words in err


@pytest.mark.parametrize("different", [False, True])
def test_exit_code_says_whether_all_is_equal(
    different: bool,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plans: list[Plan] = []

    def check(plan: Plan, *_: Any) -> Any:
        plans.append(plan)
        report = run(forms=("eager",), behaviour={"wrong": ("eager",) if different else ()})
        return SimpleNamespace(run=lambda: report)

    monkeypatch.setattr(gpu_check, "Check", check)
    monkeypatch.setattr(gpu_check.wiring, "is_cpu_build", lambda: True)
    assert main(monkeypatch, "--device=cpu", "--tiny", "--minutes=3") == int(different)
    assert "Tokens against stock" in capsys.readouterr().out
    (plan,) = plans
    assert (plan.models, plan.batch_sizes, plan.dtype) == (("tiny",), (1, 4), "float32")
    assert plan.forms == gpu_check.FORMS and plan.minutes == 3
