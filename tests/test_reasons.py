"""One vocabulary of reasons: nobody else spells one, and the counts of all processes use it."""

from __future__ import annotations

import ast
from pathlib import Path

from fusedstep.counts import WindowCounts
from fusedstep.policy import DecodeSteps, Turn, decide
from fusedstep.reasons import Reason

ROOT = Path(__file__).resolve().parent.parent


def test_only_one_file_spells_a_reason() -> None:
    """Some are also words of other things: values of options, names of parameters."""
    words = set(Reason) - {Reason.FIXED, Reason.PREFILL, Reason.WATERMARK}
    spelled = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for folder in ("fusedstep", "cli", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "fusedstep" / "reasons.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in words
    ]
    assert not spelled


def test_a_reason_with_a_name_in_it_begins_with_one_of_the_vocabulary() -> None:
    found = [
        (f"{path.name}:{node.lineno}", ast.unparse(node.values[0]))
        for path in (ROOT / "fusedstep" / "vllm_plugin").rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        and function.name.endswith(("_reason", "_unknown_parameter"))
        for node in ast.walk(function)
        if isinstance(node, ast.JoinedStr)
    ]
    assert len(found) >= 7
    assert not [(where, start) for where, start in found if not start.startswith("{Reason.")]


def test_the_policy_gives_reasons_of_the_vocabulary() -> None:
    turns = [
        Turn(remaining=()),
        Turn(remaining=(9,), prefill_in_flight=True),
        Turn(remaining=(9,), may_admit=True),
        Turn(remaining=(9,), free_blocks=2, blocks_for=lambda num_steps: num_steps),
        Turn(remaining=(9,), tokens_ahead=4),
        Turn(remaining=(99,), streams=True),
        Turn(remaining=(99,), host_stops=True),
    ]
    reasons = {decide(DecodeSteps(fixed), turn).reason for turn in turns for fixed in (None, 1, 4)}
    assert len(reasons) > 8 and all(isinstance(reason, Reason) for reason in reasons)


def test_counts_of_an_interval_and_by_way_of_json() -> None:
    before = WindowCounts()
    before.add_window(Reason.LONGEST, 64, 3)
    counts = WindowCounts.from_dict({k: v for k, v in before.as_dict().items()})
    assert counts == before
    counts.add_window(Reason.LONGEST, 64, 64)
    counts.one_step_turns[Reason.PREFILL] += 2
    new = counts.since(before)
    assert (new.windows, new.steps, new.early_exits) == (1, 64, 0)
    assert new.limits == {"longest window": 1} and new.one_step_turns == {"prefill": 2}
    assert new.lengths[4] == 0 and new.lengths[64] == 1
    assert all(type(reason) is str for reason in counts.as_dict()["one_step_turns"])
