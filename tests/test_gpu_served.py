"""``bench.gpu_check``: what only a GPU shows, the engine that users start, and what hangs."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_engine import PLAN, FakeEngine

# Fixtures of the same check.
from test_gpu_check import Commands, Run, commands, engines, run  # noqa: F401

from fusedstep.bench.engine import Engine
from fusedstep.bench.gpu_check import __main__ as gpu_check
from fusedstep.bench.gpu_check import budget as gpu_budget
from fusedstep.bench.gpu_check import device as gpu_device
from fusedstep.bench.gpu_check import measure as gpu_measure
from fusedstep.bench.gpu_check import models as gpu_models
from fusedstep.bench.gpu_check import report as gpu_report
from fusedstep.bench.gpu_check import run as gpu_run
from fusedstep.bench.gpu_check.measure import OURS
from fusedstep.bench.kernels.loop_cost import VOCAB, SmallModel
from fusedstep.errors import FusedStepError
from fusedstep.options import Options

FORMS = ("auto", "while", "eager")


def asked(engines: list[FakeEngine]) -> list[str]:  # noqa: F811
    """The forms that our engines were started with."""
    return [engine.first for engine in engines if engine.kind == OURS]


def test_users_engine_is_compared_and_measured_first(
    run: Run,  # noqa: F811
    engines: list[FakeEngine],  # noqa: F811
    commands: Commands,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = {"estimated": 3 << 30, "taken": 1 << 29}
    facts = FakeEngine.facts | {"graph_memory": memory}
    report = run(device="cuda", forms=FORMS, behaviour={"facts": facts})
    assert report.equal and len(engines) == 4 and all(engine.closed for engine in engines)
    assert asked(engines) == ["auto", "eager"]
    auto = report.forms["auto"]
    assert (auto.ran, auto.reason, auto.equal) == ("while", "proved", True)
    assert [row.form for row in report.rows] == ["auto"] * 4 + ["eager"] * 4
    assert [entry["part"] for entry in report.skipped] == ["tiny: times of while"]
    assert report.targets()[0]["form"] == "auto"
    gpu_report.print_report(report)
    assert "windows: estimated 3.00 GiB, taken 0.50 GiB" in capsys.readouterr().out


def test_users_engine_has_vllm_s_sizes(tmp_path: Path) -> None:
    """And its memory profile, which a KV cache of a given size leaves out."""
    model = gpu_models.load("qwen3-0.6b", tmp_path)
    plan = replace(PLAN, device="cuda")
    args = gpu_measure.vllm_args(model, plan, OURS, as_served=True)
    for option in ("--kv-cache-memory-bytes", "--max-num-seqs", "--compilation-config"):
        assert option not in args and option in gpu_measure.vllm_args(model, plan, OURS)
    assert "--enforce-eager" not in args


@pytest.mark.parametrize("check", gpu_device.CHECKS)
def test_a_check_that_fails(run: Run, commands: Commands, check: str) -> None:  # noqa: F811
    """It is told, and the rest goes on."""
    commands[check] = FusedStepError("RuntimeError: cuModuleLoadData: CUDA_ERROR_INVALID_PTX")
    report = run(device="cuda", forms=FORMS)
    found = report.device.pop(gpu_device.CHECKS[check].what)
    assert found == str(commands[check]) and set(report.device.values()) == {"works"}
    report.device["it"] = found
    assert gpu_check._exit_code(report) == 1 and len(report.rows) == 8


def test_where_a_while_node_hangs(
    run: Run,  # noqa: F811
    engines: list[FakeEngine],  # noqa: F811
    commands: Commands,  # noqa: F811
) -> None:
    """The engine would, too, in its proof: it is asked for the next form."""
    commands["split"] = FusedStepError(gpu_run._no_answer(60))
    run(device="cuda", forms=FORMS)
    assert asked(engines) == ["replay", "eager"]


def test_users_engine_that_does_not_start(
    run: Run,  # noqa: F811
    engines: list[FakeEngine],  # noqa: F811
    commands: Commands,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its start ends with the time limit of an engine: it is tried with the next form."""
    start = FakeEngine.__init__

    def init(engine: FakeEngine, kind: str, clock: Any, loop: str) -> None:
        if loop == "auto" and kind == OURS:
            raise FusedStepError("the fusedstep engine: no answer in 150 s")
        start(engine, kind, clock, loop)

    monkeypatch.setattr(FakeEngine, "__init__", init)
    report = run(device="cuda", forms=FORMS)
    assert asked(engines) == ["replay", "eager"] and all(engine.closed for engine in engines)
    part = "tiny: engines as users start them, --loop auto"
    assert part in [entry["part"] for entry in report.skipped]
    assert report.forms["auto"].equal is True


def test_users_engine_that_dies(
    run: Run,  # noqa: F811
    engines: list[FakeEngine],  # noqa: F811
    commands: Commands,  # noqa: F811
) -> None:
    report = run(device="cuda", forms=FORMS, behaviour={"deadly": ("auto",)})
    assert report.forms["auto"].equal is False and "died" in report.forms["auto"].reason
    assert report.forms["while"].equal is report.forms["eager"].equal is True
    assert all(engine.closed for engine in engines)


def test_the_end_of_the_run_proves_nothing(
    run: Run,  # noqa: F811
    engines: list[FakeEngine],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part that is ended because the run's time is up has not hung."""
    killed = threading.Event()
    monkeypatch.setattr(gpu_budget.Budget, "limit", lambda *_: 0.05)
    monkeypatch.setattr(FakeEngine, "kill", lambda engine: killed.set())

    def use_loop(engine: FakeEngine, loop: str) -> None:
        assert killed.wait(10)
        engine.dead = True
        raise FusedStepError("the fusedstep engine died")

    report = run(behaviour={"use_loop": use_loop})
    assert {form.equal for form in report.forms.values()} == {None}
    assert len(engines) == 2 and all(engine.closed for engine in engines)


def test_no_part_may_take_more_than_is_left() -> None:
    budget = gpu_budget.Budget(0.5, lambda: 10.0)
    assert budget.limit("start as served") == 30
    assert gpu_budget.Budget(9, lambda: 10.0).limit("form") == gpu_budget.LIMITS["form"]
    assert set(gpu_budget.LIMITS) == set(gpu_budget.GUESS)


def test_a_process_that_hangs_or_fails() -> None:
    began = time.monotonic()
    with pytest.raises(FusedStepError, match=r"no answer in 0\.5 s"):
        gpu_run._in_a_process((sys.executable, "-c", "import time; time.sleep(99)"), 0.5)
    assert time.monotonic() - began < 30
    with pytest.raises(FusedStepError, match=r"^why$"):
        gpu_run._in_a_process((sys.executable, "-c", "import sys; sys.exit('what\\nwhy')"), 60)
    assert gpu_run._in_a_process((sys.executable, "-c", "print(1)"), 60) == "1\n"


def test_an_engine_that_does_not_start_in_time(tmp_path: Path) -> None:
    options = Options.parse({"ops": "auto", "loop": "eager", "decode_steps": "auto"})
    with pytest.raises(FusedStepError, match="the oracle engine: no answer in 0 s"):
        Engine("oracle", str(tmp_path), options, start_seconds=0.0)


class Counts(SmallModel):
    """Python decides what it gives: recorded, it gives the same in every step."""

    calls = 0

    def forward(self) -> torch.Tensor:
        Counts.calls += 1
        return super().forward().roll(7 * (Counts.calls % 5), dims=1)


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this platform")
@pytest.mark.parametrize(
    ("make", "words"), [(SmallModel, None), (Counts, "not those of the eager")]
)
def test_tokens_of_a_while_node(
    make: Any, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with a tape in the place of the graph."""
    from window.tape import TapeRecorder

    from fusedstep.window.arrivals import ArrivalCounter
    from fusedstep.window.pace import HostPace

    monkeypatch.setattr(gpu_device, "STEPS", 4)
    assert VOCAB % 5
    arrivals = ArrivalCounter(None)
    given = torch.device("cpu"), arrivals, TapeRecorder(arrivals), HostPace()
    if words is None:
        gpu_device.compare(make, *given)
        return
    with pytest.raises(RuntimeError, match=words):
        gpu_device.compare(make, *given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", gpu_device.CHECKS)
def test_checks_need_a_gpu(name: str) -> None:
    with pytest.raises(RuntimeError, match="needs CUDA"):
        gpu_device.run(name)
