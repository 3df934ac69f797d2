"""``fusedstep bench kernels``: one run on the CPU, its JSON, and what is wrong usage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedstep.bench.kernels import attention
from fusedstep.bench.kernels import step as kernels
from fusedstep.bench.progress import Progress
from fusedstep.bench.spread import Spread, Timer
from fusedstep.cli.bench import _print_attention, _print_kernels
from fusedstep.cli.main import group
from fusedstep.ops.attention import AttentionLayer
from fusedstep.ops.reference_attention import reference_attention
from fusedstep.vllm_plugin.launch import wiring

CPU = torch.device("cpu")
CASES = [case.name for case in kernels.CASES]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``fusedstep`` in this process: exit code, stdout, stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            group.main(["bench", "kernels", *args], prog_name="fusedstep")
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def measured(device: str) -> dict[str, Any]:
    """One run of all cases, in a process of its own: vLLM's platform is chosen per process."""
    if device == "cpu" and not wiring.is_cpu_build():
        pytest.skip("vLLM's CUDA build has no CPU platform: use --device cuda")
    command = [sys.executable, "-c", "from fusedstep.cli import main; main()", "bench", "kernels"]
    options = [
        f"--device={device}",
        "--vocab-size=1000",
        "--batch-size=1,2",
        "--repeats=2",
        "--json=-",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_every_case_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file of --json, before the next one is measured."""
    stock = SimpleNamespace(check_platform=lambda _: None)
    monkeypatch.setattr(kernels, "stock_vllm", lambda: stock)
    monkeypatch.setattr(kernels, "memory_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(kernels, "_measure_row", lambda plan, case, *_: case.name)
    monkeypatch.setattr(kernels, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(kernels.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(kernels.Result, "as_dict", lambda self: {"rows": list(self.rows)})
    cases = kernels.pick_cases(("greedy", "top_p"))
    plan = kernels.Plan(torch.device("cpu"), cases, (1,), 100, torch.float32, 2)
    kept: list[Any] = []
    kernels.measure(plan, Progress(keep=kept.append))
    assert kept == [{"rows": ["greedy"]}, {"rows": ["greedy", "top_p"]}]


def test_result_says_where_it_is_from(measured: dict[str, Any], device: str) -> None:
    assert set(measured) == {"complete", "env", "bandwidth_gb_per_s", "rows"}
    assert measured["complete"] is True
    assert (
        measured["env"].items()
        >= {
            "device_type": "cpu",
            "ops": "native",
            "vocab_size": 1000,
            "dtype": "bfloat16",
            "repeats": 2,
        }.items()
    )
    assert {"device", "torch", "vllm", "git_sha", "threads"} <= set(measured["env"])
    assert measured["bandwidth_gb_per_s"] > 0


def test_every_case_at_every_batch_size(measured: dict[str, Any], device: str) -> None:
    rows = measured["rows"]
    assert [(row["case"], row["batch_size"]) for row in rows] == [
        (case, batch_size) for batch_size in (1, 2) for case in CASES
    ]
    for row in rows:
        for name in ("stock_us", "fusedstep_us"):
            spread = row[name]
            assert 0 < spread["p20"] <= spread["p50"] <= spread["p80"]
        bytes_per_row = 2 * 1000 + (4 * 1000 + 4 * 32) * (row["case"] == "penalties")
        assert row["moved_bytes"] == row["batch_size"] * bytes_per_row
        ours = row["fusedstep_us"]["p50"]
        assert row["gb_per_s"] == pytest.approx(row["moved_bytes"] / ours / 1e3)
        assert row["floor_share"] == pytest.approx(row["floor_us"] / ours)
        captured = [row["stock_captured"], row["fusedstep_captured"]]
        launches = [row["stock_launches"], row["fusedstep_launches"]]
        if device == "cpu":
            assert captured + launches + [row["stock_unseeded_us"]] == [None] * 5
        else:
            assert captured[1] and launches[0] > launches[1] > 0


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_stock_outputs(measured: dict[str, Any], case: str) -> None:
    for row in measured["rows"]:
        if row["case"] == case:
            assert row["num_compared"] >= 64
            assert row["num_different"] == 0
            assert row["num_tied"] <= 3 * case.startswith("top_")
            assert row["ratio"] == row["stock_us"]["p50"] / row["fusedstep_us"]["p50"]


@pytest.mark.parametrize(
    ("args", "words"),
    (
        (("--case", "nonsense"), "no case 'nonsense': use greedy, temperature"),
        (("--batch-size", "0"), "want numbers from 1 up"),
        (("--dtype", "int8"), "--dtype"),
        (("--vocab-size", "3"), "--vocab-size"),
        (("--json", "no/such/folder/x.json"), "cannot write no/such/folder/x.json"),
        pytest.param(
            ("--device", "cuda"),
            "--device cuda: torch sees no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_one_line(run: Run, args: tuple[str, ...], words: str) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert words in err


def test_missing_step_operations_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = kernels.dispatch.Choice(None, "no kernels for this device")
    monkeypatch.setattr(kernels.dispatch, "resolve", lambda device: choice)
    code, out, err = run("--device", "cpu")
    assert (code, out, err) == (2, "", "error: no kernels for this device\n")


def test_help_names_every_case(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert ", ".join(CASES) in " ".join(out.split())


def row(**changes: Any) -> kernels.Row:
    values: dict[str, Any] = {
        "case": "greedy",
        "batch_size": 8,
        "stock_us": Spread.of([40.0]),
        "fusedstep_us": Spread.of([10.0]),
        "stock_unseeded_us": None,
        "stock_launches": 12,
        "fusedstep_launches": 2,
        "stock_captured": True,
        "fusedstep_captured": True,
        "stock_unseeded_captured": None,
        "num_compared": 64,
        "num_tied": 0,
        "num_different": 0,
        "moved_bytes": 20_000_000,
        "floor_us": 5.0,
        "logits_mib": 130.0,
    }
    return kernels.Row(**values | changes)


def test_no_ratio_of_different_outputs() -> None:
    assert (row().ratio, row().gb_per_s, row().floor_share) == (4, 2000, 0.5)
    assert row(num_different=1).ratio is None


def test_table_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """What only a GPU has: launches, rows launched one by one, the sampler without seeds."""
    env = {"device": "a GPU", "device_type": "cuda", "vocab_size": 1, "dtype": "d", "vllm": "v"}
    rows = [
        row(),
        row(case="top_p", num_different=3, stock_captured=False),
        row(
            case="min_p",
            num_tied=2,
            stock_unseeded_us=Spread.of([7.0]),
            stock_unseeded_captured=False,
        ),
    ]
    _print_kernels(kernels.Result(env | {"repeats": 9}, 3000.0, rows))
    out = capsys.readouterr().out
    greedy, top_p, min_p = (line for line in out.splitlines() if "10.0 (10.0-10.0)" in line)
    assert "4.00" in greedy and "2000.0" in greedy and "50.0%" in greedy and "12 -> 2" in greedy
    assert "3/64 differ" in top_p and "40.0 (40.0-40.0) eager" in top_p and "4.00" not in top_p
    assert "7.0 (7.0-7.0) eager" in min_p and "4.00 (2 tied)" in min_p
    assert "eager" not in greedy


def test_logits_are_larger_than_the_caches_and_the_same_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "BUFFER_BYTES", 3 << 20)
    plan = kernels.Plan(CPU, kernels.CASES, (4,), 40_000, torch.float32, 2)
    logits = kernels.make_logits(plan, 4, 3.0)
    assert len(logits) == 5 and logits.nbytes >= kernels.BUFFER_BYTES
    assert 2.9 < float(logits[0].std()) < 3.1
    assert torch.equal(logits[1], kernels.make_logits(plan, 4, 3.0)[1])
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("case", kernels.CASES, ids=lambda case: case.name)
def test_no_row_stops_before_the_last_buffer(case: kernels.Case) -> None:
    num_steps = 5
    state = kernels.build_state(case.params, 3, 200, num_steps, CPU)
    ours = kernels.FusedStep("native", state, case.needs)
    for _ in range(2):
        ours.rewind()
        logits = torch.randn(num_steps, 3, 200)
        for turn in range(num_steps):
            ours.step(logits[turn])
            assert int(state.rows.num_active) == 3
        tokens = state.rows.out_tokens[:num_steps].T.int()
        assert torch.equal(ours.tokens(kernels.CONTEXT_LEN, num_steps), tokens)


class Calls:
    """A step that writes down what is done with it; so does the fake GPU below."""

    def __init__(self, captured: bool) -> None:
        self.seen: list[str] = []
        self.captured = captured
        self.capturing = False

    def rewind(self) -> None:
        self.seen.append("rewind")

    def fresh(self, logits: torch.Tensor) -> torch.Tensor:
        raise AssertionError("only on the CPU")

    def step(self, logits: torch.Tensor) -> None:
        if self.capturing and not self.captured:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.seen.append(f"step {int(logits)}")

    @contextmanager
    def capture(self, graph: object) -> Iterator[None]:
        self.seen.append("capture")
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def fake_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def note(words: str) -> Callable[..., None]:
            return lambda *_, **__: self.seen.append(words)

        stream = SimpleNamespace(wait_stream=lambda other: None)
        event = SimpleNamespace(
            record=note("event"), synchronize=lambda: None, elapsed_time=lambda end: 0.5
        )
        fakes: dict[str, Any] = {
            "current_stream": lambda: stream,
            "Stream": lambda: stream,
            "stream": lambda stream: nullcontext(),
            "set_stream": note("set_stream"),
            "synchronize": lambda: None,
            "_sleep": lambda cycles: None,
            "Event": lambda enable_timing: event,
            "CUDAGraph": lambda: SimpleNamespace(replay=note("replay")),
            "graph": self.capture,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


class Buffers(list[torch.Tensor]):
    device = torch.device("cuda")


@pytest.mark.parametrize("captured", (True, False))
def test_gpu_timer_replays_all_buffers_from_the_first_step_on(
    monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    """The order of things, with a fake in the place of the GPU."""
    calls = Calls(captured)
    calls.fake_gpu(monkeypatch)
    timer = Timer(calls, Buffers([torch.tensor(0), torch.tensor(1)]))  # type: ignore[arg-type]
    steps = ["step 0", "step 1"]
    assert calls.seen[:7] == 2 * ["rewind", *steps] + ["rewind"]
    assert calls.seen[7] == "capture" and timer.captured is captured
    assert ("set_stream" in calls.seen) is not captured
    calls.seen.clear()
    assert timer() == 250.0  # half a millisecond of two steps
    assert calls.seen == ["rewind", "event", *(["replay"] if captured else steps), "event"]


def test_attention_in_the_interpreter(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """What the GPU will be timed with, small: the output is the reference's."""
    monkeypatch.setattr(attention, "CACHE_BYTES", 1)
    monkeypatch.setattr(attention, "memory_bandwidth", lambda device: 1e12)
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    plan = attention.Plan(
        torch.device(device), attention.CASES[1:2], (1, 3), (5, 40), torch.float32, 2
    )
    result = attention.measure(plan)
    measured = [(row.case, row.batch_size, row.context) for row in result.rows]
    assert measured == [("llama-1b", n, context) for n in (1, 3) for context in (5, 40)]
    for row in result.rows:
        assert row.moved_bytes == row.batch_size * row.context * 8 * 64 * 2 * 4
        assert not row.differs and row.floor_share > 0
    decode = attention.Decode(plan, plan.cases[0], 3, 40)
    cache = decode.caches(plan.dtype)[0]
    ref = torch.empty_like(decode.query, dtype=torch.float64)
    layer = AttentionLayer(32, 8, 64, 64**-0.5)
    reference_attention(
        layer,
        decode.query,
        decode.key,
        decode.value,
        cache.clone(),
        ref,
        decode.block_table,
        decode.seq_lens,
        decode.slots,
        decode.starts,
        1,
    )
    torch.testing.assert_close(decode.step(cache).double(), ref, rtol=1e-5, atol=1e-5)


def attention_row(**changes: Any) -> attention.Row:
    values: dict[str, Any] = {
        "case": "llama-8b",
        "batch_size": 64,
        "context": 4096,
        "fusedstep_us": Spread.of([400.0]),
        "triton_us": Spread.of([600.0]),
        "flash_us": Spread.of([380.0]),
        "flash_version": 3,
        "largest_difference": 0.001,
        "differs": False,
        "moved_bytes": 1_000_000_000,
        "floor_us": 300.0,
        "cache_mib": 1024.0,
    }
    return attention.Row(**values | changes)


def test_attention_table(capsys: pytest.CaptureFixture[str]) -> None:
    """No ratio of different outputs; a backend that did not run has no time."""
    env = {"device": "a GPU", "dtype": "d", "vllm": "v", "repeats": 9}
    rows = [attention_row(), attention_row(case="x", flash_us=None), attention_row(differs=True)]
    _print_attention(attention.Result(env, 3000.0, rows, ["y: no room"]))
    out = capsys.readouterr().out
    same, alone, different = (line for line in out.splitlines() if "400.0 (400.0-400.0)" in line)
    assert "1.50" in same and "0.95" in same and "2500.0" in same and "75.0%" in same
    assert "1.50" in alone and "0.95" not in alone
    assert "differs" in different and "1.50" not in different
    assert "y: no room" in out


@pytest.mark.parametrize(
    ("args", "words"),
    (
        (("--case", "greedy"), "no attention case 'greedy': use qwen3-0.6b"),
        (("--device", "cpu"), "Triton runs on a CPU only interpreted"),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_attention_wrong_usage(run: Run, args: tuple[str, ...], words: str) -> None:
    code, out, err = run("--only", "attention", *args)
    assert (code, out) == (2, "") and err.startswith("error: ") and words in err
