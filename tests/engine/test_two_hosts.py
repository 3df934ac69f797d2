"""One engine over two hosts that share no memory, or one on each: stock's tokens, files at home.

    .venv/bin/pytest -m exhaustive tests/engine/test_two_hosts.py     # minutes

Each host is a network namespace with a ``/dev/shm`` of its own (``two_hosts.py``).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts_child
import pytest
import two_hosts
from serving import KV_CACHE, SMALL

TESTS = Path(__file__).resolve().parent.parent
FIRST = two_hosts.ADDRESSES[0]
COMMON = (*SMALL, "--max-model-len", "512", *KV_CACHE, "--served-model-name", "tiny")
NODES = ("--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", FIRST)
RANKS = (
    *("--data-parallel-size", "2", "--data-parallel-size-local", "1"),
    *("--data-parallel-address", FIRST, "--data-parallel-rpc-port", "13345"),
)
OPTIONS = {
    "nodes": ((*NODES, "--node-rank", "0"), (*NODES, "--node-rank", "1", "--headless")),
    "ranks": (RANKS, (*RANKS, "--headless", "--data-parallel-start-rank", "1")),
}
SECONDS = 800.0
Found = dict[str, Any]

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def run(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Found]:
    if why := two_hosts.missing():
        pytest.skip(f"this machine's kernel or tools cannot make two hosts of it: {why}")

    @functools.cache
    def run(kind: str, stock: bool) -> Found:
        """What host 0 found, and under ``there`` what host 1 found."""
        folder = tmp_path_factory.mktemp(kind)
        options = [[*COMMON, *words] for words in OPTIONS[kind]]
        what = {"model": tiny, "folder": str(folder), "stock": stock, "options": options}
        what["ranks"] = 2 if kind == "ranks" else 1
        child = [sys.executable, str(TESTS / "hosts_child.py")]
        hosts = [json.dumps([*child, str(n), json.dumps(what)]) for n in range(2)]
        command = [*two_hosts.JOIN, sys.executable, str(TESTS / "two_hosts.py"), *hosts]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("*.log")))
        assert done.returncode == 0, f"{done.stderr[-2000:]}\n{logs}"
        found: Found = json.loads((folder / "host0.json").read_text())
        found["there"] = json.loads((folder / "host1.json").read_text())
        assert found["left"] == found["there"]["left"] == []
        return found

    return run


def same_tokens(stock: Found, ours: Found) -> None:
    assert [len(tokens) for tokens in ours["tokens"]] == list(hosts_child.LENGTHS)
    assert ours["tokens"] == stock["tokens"]
    assert stock["files"] == stock["there"]["files"] == []


def test_a_model_over_two_hosts(run: Callable[[str, bool], Found]) -> None:
    """Host 1's worker cannot see an arrival: it has no file, and no arrival ends a window."""
    ours = run("nodes", False)
    assert ours["there"]["files"] == []
    kinds = {name.rpartition("-")[2] for name in ours["files"]}
    assert kinds == {"counts", "trace"}  # nor has host 0 one for arrivals
    assert ours["code"] == ours["there"]["code"] == 0  # of Ctrl-C on each
    counts = ours["counts"]
    assert counts["windows"] > 0 and counts["steps"] > 8 * counts["windows"]
    assert counts["tokens"] == sum(hosts_child.LENGTHS)
    # A row that has stopped may end a window, by measured times: all workers see it.
    assert counts["early_exits"] < len(hosts_child.LENGTHS)
    same_tokens(run("nodes", True), ours)


def test_an_engine_on_each_host(run: Callable[[str, bool], Found]) -> None:
    """Each has its files at home. The server, of two processes, knows the one beside it."""
    ours = run("ranks", False)
    here, there = ours["files"], ours["there"]["files"]
    for rank, names in enumerate((here, there)):
        assert {name.split("-")[2] for name in names} == {str(rank)}
        assert {"counts", "trace"} <= {name.rpartition("-")[2] for name in names}
    lengths = hosts_child.LENGTHS
    for counts, tokens in (
        (ours["counts"], lengths[0] + lengths[2]),  # told by whichever of its two API servers
        *((page, lengths[1]) for page in ours["there"]["counts"]),  # which no server tells
    ):
        assert counts["tokens"] == tokens
        assert counts["windows"] > 0 and counts["steps"] > 2 * counts["windows"]
    assert len(ours["there"]["counts"]) == 1
    assert ours["code"] == ours["there"]["code"] == 0
    same_tokens(run("ranks", True), ours)
