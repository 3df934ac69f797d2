"""``fusedstep serve`` without vLLM: its log file, and what is shown of it."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from serving import wait_for

from fusedstep.vllm_plugin.launch import quiet

LINES = """
(APIServer pid=1) INFO 11-26 10:00:18 [model.py:733] Resolved architecture: LlamaForCausalLM
(EngineCore pid=2) INFO 11-26 10:00:34 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with
(Worker pid=3) INFO 11-26 10:01:39 [model_runner.py:392] Loading model from scratch...
(Worker pid=3) WARNING 11-26 10:01:39 [cpu_worker.py:114] libiomp is not found in LD_PRELOAD.
(Worker pid=3) WARNING 11-26 10:01:39 [recording.py:169] fusedstep: loop form eager instead of x
(Worker pid=3) INFO 11-26 10:01:42 [model_runner.py:424] Model loading took 0.27 GiB memory
(Worker pid=3) ERROR 11-26 10:01:42 [core.py:1] EngineCore hit a bug.
(Worker pid=3) ERROR 11-26 10:01:42 [core.py:1] Traceback (most recent call last):
""".lstrip()
WRITES = "import os, sys; print('out'); print('err', file=sys.stderr); os.system('echo grandchild')"


class Shown:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def say(self, words: str) -> None:
        self.told.append(("say", words))

    def warn(self, words: str) -> None:
        self.told.append(("warn", words))

    def ready(self, log: Path | None, warnings: int) -> None:
        self.told.append(("ready", log, warnings))

    def restore(self) -> None:
        pass


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(quiet, "UP_LOOK_SECONDS", 0.01)


def test_the_log_gets_all_and_the_user_what_matters(tmp_path: Path) -> None:
    log, shown = tmp_path / "log", Shown()
    log.touch()
    watch = quiet.Watch(shown, log)
    with log.open("a") as file:
        file.write(LINES[:300])  # in the middle of a line
        file.flush()
        wait_for("the first part is read", lambda: len(shown.told) == 2, 5)
        file.write(LINES[300:])
    wait_for("the rest is read", lambda: len(shown.told) >= 5, 5)
    watch.until(lambda: True)
    wait_for("the server is up", lambda: ("ready", log, 2) in shown.told, 5)
    watch.end()
    assert shown.told == [
        ("say", "starting the workers"),
        ("say", "loading the weights"),
        ("warn", "fusedstep: loop form eager instead of x"),
        ("say", "preparing the KV cache"),
        ("warn", "EngineCore hit a bug."),
        ("ready", log, 2),
    ]


def test_without_a_log_the_panel_comes_all_the_same() -> None:
    shown = Shown()
    watch = quiet.Watch(shown, None)
    watch.until(lambda: True)
    wait_for("the server is up", lambda: shown.told == [("ready", None, 0)], 5)
    watch.end()


def test_a_log_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "MAX_BYTES", 1000)
    log = tmp_path / "log"
    log.touch()
    watch = quiet.Watch(Shown(), log)
    writer = os.open(log, os.O_WRONLY | os.O_APPEND)
    for _ in range(2):
        os.write(writer, b"x" * 1100 + b"\n")
        wait_for("it is cut", lambda: log.stat().st_size == 0, 5)
    os.write(writer, b"new\n")
    os.close(writer)
    watch.end()
    assert log.read_text() == "new\n"
    assert Path(f"{log}.1").stat().st_size == 1101


def test_output_of_this_process_and_of_its_children(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    with quiet.output_to(log):
        os.write(1, b"ours\n")
        subprocess.run([sys.executable, "-c", WRITES], check=True)
    os.write(2, b"after\n")
    assert sorted(log.read_text().split()) == ["before", "err", "grandchild", "ours", "out"]
    assert capfd.readouterr() == ("", "after\n")


def test_where_the_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = quiet.log_file("8000")
    assert path == tmp_path / "fusedstep" / "logs" / "serve-8000.log"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("old")
    assert quiet.log_file("8000").read_text() == ""
    for port in range(9000, 9030):
        quiet.log_file(str(port))
    left = sorted(log.name for log in path.parent.iterdir())
    assert len(left) == quiet.LOGS and left[-1] == "serve-9029.log"
    path.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file: no folder can be made there
    elsewhere = quiet.log_file("8000")
    assert elsewhere.exists() and elsewhere != path
    elsewhere.unlink()


def test_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"{n}\n" for n in range(100)))
    assert quiet.tail(log) == [str(n) for n in range(100 - quiet.TAIL_LINES, 100)]


ON_A_TERMINAL = """
import sys, time
from pathlib import Path
from fusedstep.cli.serve import Display
from fusedstep.vllm_plugin.launch import quiet
display = Display(plain=False)
log = Path(sys.argv[1])
with quiet.output_to(log):
    for stage in ("loading vLLM", "loading the weights"):
        display.say(stage)
        print("of vLLM, on stdout")
        print("of vLLM, on stderr", file=sys.stderr)
        time.sleep(0.5)
    display.warn("fusedstep: a warning")
    if sys.argv[2] == "ready":
        display.ready(log, 3)
    display.restore()
"""


@pytest.mark.parametrize("end", ("ready", "failed"))
def test_a_terminal_shows_a_line_that_changes(tmp_path: Path, end: str) -> None:
    """In a real one; what the process prints goes to the log, and not past the line."""
    log = tmp_path / "log"
    log.touch()
    main, other = pty.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL, str(log), end]
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other)
    os.close(other)
    shown = b""
    with contextlib.suppress(OSError):  # Linux: the other side is closed
        while part := os.read(main, 4096):
            shown += part
    os.close(main)
    assert process.wait(60) == 0
    text = shown.decode()
    assert "loading vLLM" in text and "loading the weights" in text and "a warning" in text
    assert "of vLLM" not in text
    assert text.count("\x1b[?25h") >= text.count("\x1b[?25l") == 1  # the cursor is back
    assert log.read_text().count("of vLLM") == 4
