"""What becomes of a draft model's graphs: kept, thrown away, or given up."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from fusedstep.vllm_plugin.runner import recording


class FakeRounds:
    """Those of an engine with two batch sizes; records as asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.sizes, self.kept = error, [4, 2], True

    def sizes_to_record(self) -> list[int]:
        return self.sizes

    def record(self, recorder: Any, sizes: list[int]) -> None:
        assert sizes == self.sizes
        if self.error is not None:
            raise self.error

    def forget_records(self) -> None:
        self.kept = False


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    free = iter((1000, 900))
    monkeypatch.setattr(recording, "graph_capture", lambda **_: nullcontext())
    monkeypatch.setattr(recording, "CudaRecorder", lambda *_: None)
    monkeypatch.setattr(recording, "_free_bytes", lambda: next(free))
    monkeypatch.setattr(recording, "_all_ranks", lambda fine: fine)
    return monkeypatch


def record(rounds: FakeRounds, *, profile_only: bool = False) -> int:
    class Runner:
        device = None

    return recording.record_drafter(Runner(), rounds, None, profile_only=profile_only)  # type: ignore[arg-type]


def test_graphs_are_kept(started: Any) -> None:
    rounds = FakeRounds()
    assert record(rounds) == 100 and rounds.kept


def test_those_of_the_estimate_are_not(started: Any) -> None:
    rounds = FakeRounds()
    assert record(rounds, profile_only=True) == 100 and not rounds.kept


def test_the_host_launches_what_cannot_be_recorded(
    started: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rounds = FakeRounds(RuntimeError("a sync"))
    with caplog.at_level("WARNING", "vllm.fusedstep"):
        assert record(rounds) == 0 and not rounds.kept
    assert "the host launches the draft model: a sync" in caplog.text


def test_all_ranks_do_the_same(started: Any, caplog: pytest.LogCaptureFixture) -> None:
    started.setattr(recording, "_all_ranks", lambda fine: False)
    rounds = FakeRounds()
    record(rounds)
    assert not rounds.kept


def test_nothing_to_record(started: Any) -> None:
    rounds = FakeRounds(AssertionError("nothing is recorded"))
    rounds.sizes = []
    assert record(rounds) == 0
