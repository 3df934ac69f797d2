"""However a command ends, nothing of it is left: made-up processes of every kind, without vLLM.

Real commands: tests/engine/test_orphans.py.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orphans
import pytest
from orphans import Driver

COMMAND = str(Path(__file__).with_name("command_child.py"))
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "ctrl-c", "SIGKILL", "SIGSEGV", "frozen")
BY_ITSELF = ("return", "raise", "_exit")
LEAVES_SOME = {"off": "SIGKILL", "on": "no guardian", "theirs": "SIGKILL"}


def start(folder: Path, how: str, end: str, **spec: Any) -> Driver:
    command = (sys.executable, COMMAND, how)
    return Driver(folder, command, end, moment="said", word="READY", **spec)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each end leaves; all at once, as they wait most of their time."""
    root = tmp_path_factory.mktemp("commands")
    drivers = {end: start(root / end, "on", end) for end in SIGNALS}
    drivers["swallows"] = start(root / "swallows", "swallows", "SIGTERM")
    drivers |= {how: start(root / how, how, "itself") for how in BY_ITSELF}
    for how, end in LEAVES_SOME.items():
        drivers[f"{how}, {end}"] = start(root / how, how, end, patience=8)
    return {end: driver.result() for end, driver in drivers.items()}


@pytest.mark.parametrize("end", (*SIGNALS, *BY_ITSELF, "swallows"))
def test_nothing_is_left(ended: dict[str, Any], end: str) -> None:
    result = ended[end]
    assert len(result["seen"]) >= 14, result["seen"]
    assert result["left"] == [] and result["files"] == [], result
    assert result["seconds"] < 10


def test_signals_end_a_command_cleanly(ended: dict[str, Any]) -> None:
    for end in ("SIGINT", "SIGTERM", "SIGHUP", "ctrl-c"):
        assert ended[end]["code"] == 130
        assert "finally" in ended[end]["log"]
        if end != "ctrl-c":  # which its processes get, too
            assert "Traceback" not in ended[end]["log"]
    assert ended["SIGKILL"]["code"] == -signal.SIGKILL
    assert ended["raise"]["code"] == 1
    assert ended["swallows"]["code"] == 130 and ended["swallows"]["seconds"] > 4


def test_without_all_this_they_stay(ended: dict[str, Any]) -> None:
    result = ended["off, SIGKILL"]
    assert len(result["left"]) >= 10 and result["files"]


def test_a_killed_guardian_is_no_loss_for_those_that_belong(ended: dict[str, Any]) -> None:
    """One does not belong yet; one has no environment; one has lost its command's guardian, too."""
    assert len(ended["on, no guardian"]["left"]) == 3


def test_what_a_program_starts_besides_is_its_own_business(ended: dict[str, Any]) -> None:
    assert ended["theirs, SIGKILL"]["left"] == ["sleeping /bin/sleep 303"]


@pytest.mark.parametrize(
    ("status", "seconds"), (("running", 1), ("disk-sleep", 1), ("sleeping", 20))
)
def test_what_works_has_ten_seconds_of_a_core(
    monkeypatch: pytest.MonkeyPatch, status: str, seconds: float
) -> None:
    """A busy machine gives it a twentieth of one; to sleep takes no core."""
    now, has = iter(range(100)), iter(n / 20 for n in range(100))
    monkeypatch.setattr(orphans, "below", lambda: ["a process"])
    monkeypatch.setattr(orphans, "status", lambda process: status)
    monkeypatch.setattr(orphans, "used", lambda process: next(has))
    monkeypatch.setattr(orphans, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    clock = orphans.Clock()
    for _ in range(20):
        assert clock.tick() == ["a process"]
    assert clock.seconds == pytest.approx(seconds)


def test_nohup_is_respected() -> None:
    code = (
        "import signal; from fusedstep import processes; "
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); processes.interrupt_on_signals(); "
        "print(*(signal.getsignal(n) is signal.SIG_IGN for n in (signal.SIGHUP, signal.SIGTERM)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
