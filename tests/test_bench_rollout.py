"""``bench rollout`` with engines that answer what a test wants: load, figures, comparison."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from fusedstep.bench import rollout, rollout_result
from fusedstep.bench.rollout import Plan
from fusedstep.bench.rollout_result import Run, compare
from fusedstep.cli.main import group
from fusedstep.errors import FusedStepError

PLAN = Plan(
    num_prompts=4,
    samples=3,
    input_len=5,
    output_len=64,
    lengths="ragged",
    temperature=1.0,
    logprobs=0,
    repeats=2,
)
COUNTS = {
    "windows": 3,
    "steps": 40,
    "unused_steps": 10,
    "idle_row_steps": 7,
    "one_step_turns": {"prefill": 2},
}
Change = Callable[[str, dict[str, Any]], dict[str, Any]]


class FakeEngine(contextlib.nullcontext[Any]):
    """Gives every sample tokens 0, 1, ...; fusedstep is twice as fast."""

    log: ClassVar[list[tuple[str, str]]] = []
    change: Change = staticmethod(lambda kind, told: told)  # type: ignore[assignment]
    dies_at = 10**9

    def __init__(self, kind: str, *_: Any) -> None:
        super().__init__(self)
        self.kind, self.rollouts = kind, 0

    def stop_clock(self) -> None:
        self.log.append((self.kind, "stopped"))

    def go_on(self) -> None:
        self.log.append((self.kind, "goes on"))

    def call(self, method: str, /, **given: Any) -> Any:
        if method == "vocab_size":
            return 100
        if method == "rpc":
            facts = {"dtype": "float32", "ops": "native", "loop": "eager"}
            return facts
        if method == "window_counts":
            if self.kind != "fusedstep" or not self.rollouts:
                return None
            numbers = {
                name: value * self.rollouts
                for name, value in COUNTS.items()
                if not isinstance(value, dict)
            }
            return numbers | {"one_step_turns": {"prefill": 2 * self.rollouts}}
        assert method == "roll_out"
        if len([entry for entry in self.log if entry[1] == "rolled out"]) >= self.dies_at:
            raise FusedStepError(f"the {self.kind} engine died")
        self.log.append((self.kind, "rolled out"))
        self.rollouts += 1
        lengths = [params["max_tokens"] for params in given["params"]]
        pace = 0.5 if self.kind == "fusedstep" else 1.0
        told = {
            "seconds": pace * max(lengths),
            "ended": tuple(pace * length for length in lengths),
            "rows": len(lengths),
            "tokens": tuple(tuple(range(length)) for length in lengths),
            "logprobs": tuple((-1.0,) * length for length in lengths),
        }
        return FakeEngine.change(self.kind, told)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(rollout, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "log", [])
    monkeypatch.setattr(rollout.wiring, "is_cpu_build", lambda: True)
    return FakeEngine


ARGS = ("bench", "rollout", "--repeats=2", "--output-len=64", "--num-prompts=4", "--samples=4")


def test_requests_are_ragged_seeded_and_the_same_again() -> None:
    prompts, params = PLAN.requests(1, 100)
    assert (prompts, params) == PLAN.requests(1, 100)
    assert len(prompts) == len(params) == 12
    assert prompts[0] == prompts[2] != prompts[3]  # the samples of a prompt
    seeds = [each["seed"] for each in params]
    assert len(set(seeds)) == 12 and seeds[1] == seeds[0] + 1  # as vLLM counts those of n
    others, more = PLAN.requests(2, 100)
    assert others[0] != prompts[0] and not set(seeds) & {each["seed"] for each in more}
    lengths = replace(PLAN, num_prompts=1000, output_len=1000).output_lens(1)
    ordered = sorted(lengths)
    assert 200 < ordered[len(ordered) // 2] < 300 and ordered[-1] == 1000 and ordered[0] > 0
    assert sum(lengths) / len(lengths) > 1.2 * ordered[len(ordered) // 2]  # a heavy tail
    assert set(replace(PLAN, lengths="equal").output_lens(1)) == {64}


def run_of(**given: Any) -> Run:
    told: dict[str, Any] = {
        "seconds": 10.0,
        "ended": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0, 10.0),
        "rows": 8,
        "tokens": ((1, 2, 3),),
        "logprobs": ((-1.0, -2.0, -3.0),),
    }
    return Run.of(told | given, None, None)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    # Fewer than a quarter of the rows: one of 8 or of 5, none of 4; two of 9.
    ((8, 1.0), (5, 1.0), (4, 0.0), (1, 0.0), (9, 4.0)),
)
def test_tail_begins_when_a_quarter_is_no_longer_active(rows: int, seconds: float) -> None:
    assert run_of(rows=rows).tail_seconds == seconds


def test_engines_alternate_and_all_is_told(tmp_path: Path, model: str) -> None:
    path = tmp_path / "result.json"
    result = CliRunner().invoke(group, [*ARGS, "--json", str(path), model])
    assert result.exit_code == 0, result.output
    work = [kind for kind, what in FakeEngine.log if what == "rolled out"]
    assert work == ["oracle", *("stock", "fusedstep") * 3]  # warm-up and two repeats
    running = {"stock", "fusedstep"}
    for kind, what in FakeEngine.log:
        if what == "rolled out" and kind != "oracle":
            assert running == {kind}
        elif kind != "oracle":
            (running.add if what == "goes on" else running.discard)(kind)
    found = json.loads(path.read_text())
    stock, ours = found["rows"]
    assert found["complete"] is True and found["speedup"] == pytest.approx(2.0)
    assert (stock["windows"], ours["windows"]) == (0, 6)  # of two repeats, not of the warm-up
    assert ours["unused_share"] == pytest.approx(0.2) and ours["one_step_turns"] == {"prefill": 4}
    assert (stock["idle_row_steps"], ours["idle_row_steps"]) == (0, 14)
    assert stock["tail_seconds"]["p50"] == pytest.approx(2 * ours["tail_seconds"]["p50"])
    assert stock["tokens"] == ours["tokens"] > 0
    assert found["comparison"] | {"tokens": 0} == {
        "oracle": "oracle",
        "dtype": "float32",
        "samples": 16,
        "same": 16,
        "tokens": 0,
        "first_difference": None,
        "logprob_gap": 0.0,
        "logprob_tolerance": 1e-3,
        "agrees": True,
    }
    assert "2.00" in result.stdout and "20 of 100 (20.0%)" in result.stdout
    words = [line.partition("] ")[2] for line in result.stderr.splitlines()]
    assert words == [
        "oracle: starting the engine",
        "oracle: 16 samples, to compare",
        "stock: starting the engine",
        "fusedstep: starting the engine",
        "warming up",
        "repeat 1 of 2",
        "repeat 2 of 2",
    ]


def test_greedy_is_held_against_stock_itself(model: str) -> None:
    result = CliRunner().invoke(group, [*ARGS, "--temperature=0", "--json=-", model])
    assert json.loads(result.stdout)["comparison"]["oracle"] == "stock"
    assert "oracle" not in {kind for kind, _ in FakeEngine.log}


def test_a_run_that_is_cut_short_leaves_its_repeats(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(FakeEngine, "dies_at", 5)
    result = CliRunner().invoke(group, [*ARGS, "--json", str(path), model])
    assert result.exit_code == 2 and "engine died" in result.stderr
    kept = json.loads(path.read_text())
    assert kept["complete"] is False
    assert [len(row["repeats_tokens_per_s"]) for row in kept["rows"]] == [1, 1]


def _other_token(kind: str, told: dict[str, Any]) -> dict[str, Any]:
    tokens = [list(sample) for sample in told["tokens"]]
    tokens[3][-1] += kind == "fusedstep"
    return told | {"tokens": tuple(map(tuple, tokens))}


def _other_logprob(kind: str, told: dict[str, Any]) -> dict[str, Any]:
    moved = 0.01 * (kind == "fusedstep")
    return told | {"logprobs": tuple((*each[:-1], each[-1] + moved) for each in told["logprobs"])}


@pytest.mark.parametrize("change", (_other_token, _other_logprob))
def test_no_speed_up_of_different_outputs(
    monkeypatch: pytest.MonkeyPatch, model: str, change: Change
) -> None:
    monkeypatch.setattr(FakeEngine, "change", staticmethod(change))
    result = CliRunner().invoke(group, [*ARGS, model])
    assert result.exit_code == 1 and "outputs differ" in result.stdout
    told = json.loads(CliRunner().invoke(group, [*ARGS, "--json=-", model]).stdout)
    assert told["speedup"] is None and told["comparison"]["agrees"] is False


def test_comparison_goes_up_to_the_first_difference() -> None:
    want = run_of(tokens=((1, 2, 3),) * 2, logprobs=((-1.0, -2.0, -3.0),) * 2)
    have = run_of(tokens=((1, 2, 3), (1, 9, 9)), logprobs=((-1.0, -2.0, -3.1), (-1.2, -7.0, -7.0)))
    found = compare(want, have, "oracle", "bfloat16")
    assert (found.same, found.first_difference, found.tokens) == (1, 1, 5)
    assert found.logprob_gap == pytest.approx(0.2)  # what comes after it says nothing
    assert not found.agrees  # one of 5 tokens, though a tie would be one of 200
    assert replace(found, tokens=rollout_result.TOKENS_PER_TIE).agrees
    assert not replace(found, tokens=10**6, dtype="float32").agrees
    shorter = compare(want, replace(want, tokens=((1, 2, 3), (1, 2))), "stock", "float32")
    assert (shorter.same, shorter.first_difference) == (1, 2)
    silent = replace(want, logprobs=())
    assert compare(silent, silent, "stock", "float32").logprob_gap is None
