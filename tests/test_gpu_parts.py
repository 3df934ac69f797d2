"""What ``bench.gpu_check`` measures with: traces, models, the probe, the cost of the loop."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_engine import PLAN, VOCAB, Clock

from fusedstep.bench import trace as gpu_trace
from fusedstep.bench.gpu_check import measure as gpu_measure
from fusedstep.bench.gpu_check import models as gpu_models
from fusedstep.bench.gpu_check.budget import Budget
from fusedstep.bench.gpu_check.measure import OURS, STOCK
from fusedstep.bench.kernels import loop_cost
from fusedstep.bench.probe import WorkerProbe
from fusedstep.bench.spread import Spread
from fusedstep.loop_forms import LoopForm


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(1, 3), (3, 4)], 3),
        ([(5, 6), (1, 3), (2, 4)], 4),
        ([(0, 10), (2, 3), (4, 5)], 10),
        ([(0, 10), (2, 12), (20, 20)], 12),
    ],
)
def test_union_of_intervals(intervals: list[tuple[float, float]], length: float) -> None:
    assert gpu_trace.union_length(intervals) == length


def test_clipped_intervals() -> None:
    assert gpu_trace.clipped([(0, 4), (5, 6), (7, 20), (30, 31)], 3, 10) == [
        (3, 4),
        (5, 6),
        (7, 10),
    ]


def test_idle_share_is_that_of_the_steady_part() -> None:
    """Kernels of 3 in every 4 microseconds; a long gap at the start, which is prefill, is out."""
    kernels = [(0.0, 1.0, "prefill")]
    for i in range(200):
        kernels += [(200.0 + 4 * i, 202.0 + 4 * i, "long"), (202.0 + 4 * i, 203.0 + 4 * i, "short")]
    trace = gpu_trace.summarise(kernels, num_steps=50)
    assert trace.idle_share == pytest.approx(0.25, abs=0.01) and trace.num_kernels == 401
    assert [share.name for share in trace.longest] == ["long", "short"]
    assert [share.share for share in trace.longest] == pytest.approx([2 / 3, 1 / 3], abs=0.01)


PREFILL_AND_A_LAUNCH = [(float(i), i + 0.5, "") for i in range(300)] + [(9000.0, 9001.0, "")]


@pytest.mark.parametrize("kernels", [[], [(0.0, 1.0, "")] * 9, PREFILL_AND_A_LAUNCH])
def test_a_trace_that_misses_the_steps_says_so(kernels: list[gpu_trace.Kernel]) -> None:
    trace = gpu_trace.summarise(kernels, num_steps=5)
    assert trace.idle_share is None
    assert trace.reason == f"the profiler saw {len(kernels)} kernels in 5 steps"


def test_budget_learns_how_long_a_part_takes() -> None:
    clock = Clock()
    budget = Budget(1.0, clock)
    assert budget.fits("point") and not budget.fits("start")
    with budget.spending("point"):
        clock.now += 25
    assert budget.fits("point")
    with budget.spending("point"):
        clock.now += 11
    assert not budget.fits("point")  # 36 and 25 more


def test_budget_is_shared() -> None:
    clock = Clock()
    budget = Budget(1.0, clock)
    budget.divide(5)
    assert budget.fits("equality") and not budget.fits("form")
    clock.now = 12.0
    assert not budget.fits("equality")
    budget.divide(2)
    assert budget.fits("form")


@pytest.mark.parametrize("name", gpu_models.SHAPES)
def test_models_are_folders_for_vllm(name: str, tmp_path: Path) -> None:
    model = gpu_models.load(name, tmp_path)
    config = json.loads((tmp_path / name / "config.json").read_text())
    assert config == gpu_models.SHAPES[name] and model.vocab_size == config["vocab_size"]
    assert model.dummy == (not (tmp_path / name / "model.safetensors").exists())
    again = gpu_models.load(str(tmp_path / name), tmp_path)
    assert again == replace(model, path=tmp_path / name)


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [("qwen3-0.6b", 114688), ("llama-3.2-1b", 32768), ("llama-3.1-8b", 131072)],
)
def test_kv_cache_of_a_token(name: str, num_bytes: int, tmp_path: Path) -> None:
    assert gpu_models.load(name, tmp_path).kv_bytes_per_token("bfloat16") == num_bytes


def test_engine_arguments(tmp_path: Path) -> None:
    model = gpu_models.load("llama-3.1-8b", tmp_path)
    plan = replace(PLAN, device="cuda", dtype="bfloat16", batch_sizes=(1, 256), long_len=192)
    stock = gpu_measure.vllm_args(model, plan, STOCK)
    ours = gpu_measure.vllm_args(model, plan, OURS)
    assert stock == (*ours, "--logprobs-mode", "processed_logprobs")
    assert {"--async-scheduling", "dummy", "--skip-tokenizer-init"} <= set(ours)
    assert '{"cudagraph_capture_sizes": [1, 256]}' in ours
    assert int(ours[ours.index("--kv-cache-memory-bytes") + 1]) == 256 * (3 + 384) * 131072
    assert "--enforce-eager" in gpu_measure.vllm_args(model, PLAN, OURS)


def test_no_ratio_of_noise() -> None:
    side = gpu_measure.Side(Spread.of([2.0]), None, None, "")
    row = gpu_measure.Row("m", "while", "while", 1, 0.0, True, 0, side, side)
    assert row.ratio == 1
    assert replace(row, stock=replace(side, ms_per_step=Spread.of([-1.0]))).ratio is None
    assert replace(row, equal=False).ratio is None


def test_waiting_is_told_from_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the watching thread; a wait of another thread is nobody's."""

    def busy() -> None:
        began = time.thread_time()
        while time.thread_time() - began < 0.02:
            pass

    monkeypatch.setattr(torch.cuda, "synchronize", busy)
    probe = WorkerProbe()
    probe.watch_host()
    before = probe.host_seconds()
    torch.cuda.synchronize()
    assert probe.host_seconds() - before < 0.01
    thread = threading.Thread(target=torch.cuda.synchronize)
    thread.start()
    thread.join()
    assert probe.waiting_seconds < 0.035
    busy()
    assert probe.host_seconds() - before > 0.015
    probe.stop_watching_host()
    assert torch.cuda.synchronize is busy


def test_random_weights_are_the_same_again() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Parameter(torch.zeros(VOCAB, 16))
            self.linear = torch.nn.Parameter(torch.zeros(64, 16))
            self.norm = torch.nn.Parameter(torch.zeros(16))
            self.bias = torch.nn.Parameter(torch.ones(16))

    models = Model(), Model()
    for model in models:
        probe = WorkerProbe()
        probe.model_runner = SimpleNamespace(
            device=torch.device("cpu"), get_model=lambda model=model: model
        )
        assert probe.randomise_weights(0, VOCAB) == 16 * (VOCAB + 64 + 2)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)
    assert float(model.embedding.detach().std()) == pytest.approx(3 / 4, rel=0.1)
    assert float(model.linear.detach().std()) == pytest.approx(1 / 4, rel=0.1)
    assert torch.equal(model.norm, torch.ones(16)) and torch.equal(model.bias, torch.zeros(16))


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this platform")
@pytest.mark.parametrize("form", LoopForm)
def test_loop_cost_runs_all_steps_of_its_windows(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with tapes in the place of graphs: that the windows are whole, not their time."""
    from window.tape import TapeRecorder

    from fusedstep.window.pace import HostPace

    for name, value in {"NUM_STEPS": 9, "WINDOWS": 1, "REPEATS": 2, "VOCAB": 64}.items():
        monkeypatch.setattr(loop_cost, name, value)
    monkeypatch.setattr(loop_cost, "FULL_BUDGET", loop_cost.FULL_BUDGET * 0 + 9)
    spread = loop_cost.time_form(form, torch.device("cpu"), TapeRecorder(), HostPace())
    assert spread.p50 > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_loop_cost_without_a_gpu() -> None:
    assert loop_cost.measure() == dict.fromkeys(map(str, LoopForm), "needs CUDA")
