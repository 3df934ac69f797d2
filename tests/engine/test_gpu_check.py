"""``bench.gpu_check`` end to end on the CPU: two real engines, a model of two layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusedstep.vllm_plugin.launch import wiring


@pytest.mark.skipif(not wiring.is_cpu_build(), reason="vLLM's CUDA build has no CPU platform")
def test_tiny_on_the_cpu(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "fusedstep.bench.gpu_check", "--device=cpu", "--tiny"]
    plan = ["--batch-sizes=2", "--forms=auto,eager", "--repeats=1", f"--json={result}"]
    done = subprocess.run([*command, *plan], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(result.read_text())
    assert report["equal"] is True
    for form in ("auto", "eager"):
        known = report["forms"][form]
        assert (known["ran"], known["reason"]) == ("eager", "the device is a cpu")
        assert known["equal"] is True and known["requests"] >= 41 and known["near_ties"] == 0
    assert [row["temperature"] for row in report["rows"]] == [0, 1]
    assert all(row["equal"] and row["near_ties"] == 0 for row in report["rows"])
    assert {target["reached"] for target in report["targets"]} == {None}
    assert report["loop_cost_us"] is None
    engines = report["env"]["engines"]["tiny"]
    assert engines["stock"]["runner"] == engines["fusedstep"]["runner"] == "v2"
    assert engines["fusedstep"]["dtype"] == "float32"
    assert [entry["part"] for entry in report["skipped"]] == ["tiny: times of eager"]
    assert "Tokens against stock" in done.stdout and "tiny: tokens of eager" in done.stderr
