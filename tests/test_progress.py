"""A long command says what it does, and what it found so far outlives it."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fusedstep.bench import latency, progress, result_file, verify
from fusedstep.cli.main import group
from fusedstep.errors import ConfigError, FusedStepError


class FakeEngine(contextlib.nullcontext[Any]):
    """Answers like an engine; dies at the request number ``dies_at``."""

    dies_at = 10**9
    asked = 0

    def __init__(self, kind: str, *_: Any) -> None:
        super().__init__(self)
        self.kind = kind

    def stop_clock(self) -> None:
        pass

    def go_on(self) -> None:
        pass

    def call(self, method: str, /, **given: Any) -> Any:
        if method in ("vocab_size", "num_drafts"):
            return 100 * (method == "vocab_size")
        if method == "accepted_share":
            return None
        if method == "rpc":
            stats = {"steps": 8, "windows": 1, "stock_steps": {}, "ops": "native", "loop": "eager"}
            return stats if given["method"] == "window_stats" else 1.0
        FakeEngine.asked += 1
        if FakeEngine.asked > self.dies_at:
            raise FusedStepError(f"the {self.kind} engine died")
        if given.get("timing"):
            return random.random() + 0.1 * given["params"][0]["max_tokens"], []
        done = {"token_ids": [1], "finish_reason": "stop", "logprobs": None}
        return [{"prompt": prompt, "completions": [done]} for prompt in given["prompts"]]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    for library in (latency, verify):
        monkeypatch.setattr(library, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "asked", 0)
    return FakeEngine


LATENCY = ("bench", "latency", "--batch-size", "1,2", "--temperature", "0", "--repeats", "2")


def test_latency_into_a_file(monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path) -> None:
    """A line per repeat on stderr; when it is cut short, the points before that are in the file."""
    path = tmp_path / "result.json"
    result = CliRunner().invoke(group, [*LATENCY, "--json", str(path), model])
    assert result.exit_code == 0, result.output
    whole = json.loads(path.read_text())
    assert whole["complete"] is True and len(whole["rows"]) == 4 and whole["peak_rss_mib"]
    words = [line.partition("] ")[2] for line in result.stderr.splitlines()]
    assert words == [
        "stock: starting the engine",
        "fusedstep: starting the engine",
        *(
            f"batch {size}, temperature 0: {turn}"
            for size in (1, 2)
            for turn in ("warming up", "repeat 1 of 2", "repeat 2 of 2")
        ),
    ]
    assert all(line.startswith("[ ") for line in result.stderr.splitlines())

    path.unlink()
    monkeypatch.setattr(FakeEngine, "dies_at", FakeEngine.asked * 3 // 2)
    result = CliRunner().invoke(group, [*LATENCY, "--json", str(path), model])
    assert result.exit_code == 2 and "engine died" in result.stderr
    kept = json.loads(path.read_text())
    assert kept["complete"] is False and len(kept["rows"]) == 2 and kept["env"]["model"]
    assert [ratio["batch_size"] for ratio in kept["ratios"]] == [1]


def test_verify_keeps_what_stock_gave(
    monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    args = ["verify", model, "--limit", "2", "--json", str(path)]
    result = CliRunner().invoke(group, args)
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["identical"] == 2
    assert len(result.stderr.splitlines()) == 4
    monkeypatch.setattr(FakeEngine, "dies_at", 3)
    assert CliRunner().invoke(group, args).exit_code == 2
    kept = json.loads(path.read_text())
    assert kept["complete"] is False and len(kept["expected"]) == 2


def test_a_result_on_stdout_comes_once(model: str) -> None:
    result = CliRunner().invoke(group, [*LATENCY, "--json", "-", model])
    assert json.loads(result.stdout)["complete"] is True


def test_a_file_is_replaced_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    result_file.write(str(path), {"n": 1})
    write_text = Path.write_text

    def disk_full(file: Path, text: str, **given: Any) -> None:
        write_text(file, text[:3], **given)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="No space left"):
        patch.setattr(Path, "write_text", disk_full)
        result_file.write(str(path), {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    link = tmp_path / "link"
    link.symlink_to(path)
    result_file.write(str(link), {"n": 3})
    assert link.is_symlink() and json.loads(path.read_text()) == {"n": 3}


def test_what_is_no_plain_file_gets_the_end_result_only(tmp_path: Path) -> None:
    """A pipe or a device is written to, never replaced."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        result_file.check(str(fifo))
        progress.to(str(fifo), lambda _: None).keep({"n": 1})
        result_file.write(str(fifo), {"n": 2})
        assert json.loads(os.read(reader, 1000)) == {"n": 2}
    finally:
        os.close(reader)
    result_file.check("/dev/null")


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "x", "its folder does not exist"),
        ("/proc/x.json", "cannot write /proc/x.json"),
    ):
        with pytest.raises(ConfigError, match=words):
            result_file.check(str(path))
    assert list(tmp_path.iterdir()) == []
