"""What becomes of a draft model's graphs: kept, thrown away, or given up."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from fusedstep.vllm_plugin.runner import recording


class FakeDrafter:
    """Records as asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.kept = error, True

    def record(self, recorder: Any, sizes: list[int]) -> None:
        assert sizes == [4, 2]
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


def record(
    drafter: FakeDrafter, sizes: tuple[int, ...] = (4, 2), *, profile_only: bool = False
) -> int:
    runner: Any = SimpleNamespace(device=None)
    fake: Any = drafter
    unused: Any = None
    return recording.record_drafts(runner, fake, list(sizes), unused, profile_only=profile_only)


def test_graphs_are_kept(started: Any) -> None:
    drafter = FakeDrafter()
    assert record(drafter) == 100 and drafter.kept


def test_those_of_the_estimate_are_not(started: Any) -> None:
    drafter = FakeDrafter()
    assert record(drafter, profile_only=True) == 100 and not drafter.kept


def test_the_host_launches_what_cannot_be_recorded(
    started: Any, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = FakeDrafter(RuntimeError("a sync"))
    with caplog.at_level("WARNING", "vllm.fusedstep"):
        assert record(drafter) == 0 and not drafter.kept
    assert "the host launches the draft model: a sync" in caplog.text


def test_all_ranks_do_the_same(started: Any, caplog: pytest.LogCaptureFixture) -> None:
    started.setattr(recording, "_all_ranks", lambda fine: False)
    drafter = FakeDrafter()
    record(drafter)
    assert not drafter.kept


def test_nothing_to_record(started: Any) -> None:
    drafter = FakeDrafter(AssertionError("nothing is recorded"))
    assert record(drafter, ()) == 0
