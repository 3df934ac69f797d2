"""``fusedstep bench kernels --static``: both sides compiled for a GPU that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="there is no Triton for this platform")

from fusedstep.bench.kernels import static
from fusedstep.bench.kernels.absent_gpu import CHIPS
from fusedstep.bench.kernels.attention import Case
from fusedstep.bench.kernels.machine_code import Code
from fusedstep.cli.main import group


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """JSON and text of one run, in a process of its own: here the interpreter is switched on."""
    path = tmp_path_factory.mktemp("static") / "out.json"
    command = [sys.executable, "-c", "from fusedstep.cli import main; main()", "bench", "kernels"]
    cases = ["--case=qwen3-0.6b", "--case=top_k_top_p", "--batch-size=1", "--context=128,4096"]
    done = subprocess.run(
        [*command, "--static=sm_90", *cases, f"--json={path}"],
        env=os.environ | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def kernels(rows: list[dict[str, Any]], case: str, side: str) -> list[str]:
    return [row["kernel"] for row in rows if row["case"] == case and row["side"] == side]


def test_both_sides_are_compiled(printed: tuple[dict[str, Any], str]) -> None:
    result, text = printed
    assert result["complete"] and result["target"] == "sm_90"
    rows = result["rows"]
    assert kernels(rows, "qwen3-0.6b n=1", "fusedstep") == ["attend_kernel"]
    stock = kernels(rows, "qwen3-0.6b n=1", "stock")
    assert {"kernel_unified_attention", "reduce_segments"} < set(stock)
    # As on a GPU: stock's own truncation between two kernels of ours.
    truncation = "_topk_topp_kernel"
    assert kernels(rows, "top_k_top_p n=1", "fusedstep") == [
        "sample_kernel",
        truncation,
        "draw_kernel",
    ]
    assert truncation in kernels(rows, "top_k_top_p n=1", "stock")
    for row in rows:
        assert row["registers"] > 8 and row["size"] > 16 and row["programs_per_sm"] >= 1
        assert row["kernel"][:16] in text
    assert "not calibrated" in " ".join(text.split())


def test_attention_is_as_cheap_as_it_was(printed: tuple[dict[str, Any], str]) -> None:
    (ours,) = [row for row in printed[0]["rows"] if row["kernel"] == "attend_kernel"]
    assert ours["per_64_tokens"] <= 450
    assert ours["barriers_before"] <= 1
    assert ours["registers"] <= 240
    assert ours["local"] == 0
    assert ours["load_bytes"] == 16


def test_no_time_is_below_the_floor(printed: tuple[dict[str, Any], str]) -> None:
    times = printed[0]["times"]
    assert [time["context"] for time in times] == [128, 4096]
    assert all(0 < time["floor_us"] < time["fusedstep_us"] for time in times)


def test_the_time_model() -> None:
    """A tile, alone; then a row of many pieces, which one program merges."""
    code = Code(
        size=2000,
        load_bytes=16,
        loads_before=8,
        barriers_before=1,
        before_load=500,
        before_arrival=1000,
        noise_path=0,
        main_loop=400,
        other_loops=300,
    )
    chip, case = CHIPS["sm_90"], Case("eight queries of a head", 8, 1, 128)
    shape = {"TILE": 64, "MIN_TILES": 2, "CHUNK": 16, "CHUNK_M": 4}
    cycle_us = 4 / 1755
    start_us = 1.0 + 4 * 0.6 + (500 + 0.25 * 800) * cycle_us
    one = static.attention_us(chip, code, case, 1, 64, shape)
    assert one == pytest.approx(start_us + 400 * cycle_us)
    # 132 programs of two tiles; their pieces are nine rounds of 16, twice for all queries.
    many = static.attention_us(chip, code, case, 1, 64 * 264, shape)
    loads_us = 132 * 64 * 2 * 128 * 2 / 3350e3
    body_us = 2 * max(loads_us, 400 * cycle_us)
    assert many == pytest.approx(start_us + body_us + (2 * 9 + 1) * 0.6)


@pytest.mark.parametrize(
    ("args", "words"),
    (
        (("sm_75",), "'sm_75' is not one of"),
        (("sm_90", "--dtype", "float32"), "--static measures nothing: leave out --dtype"),
        (("sm_90", "--case", "min"), "--static: no case 'min': use qwen3-0.6b, llama-1b"),
    ),
)
def test_wrong_usage(args: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_error(("--static", *args), words, capsys)


@pytest.mark.parametrize("target", ("sm_90", "gfx942"))
def test_no_compiler(
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(static, "find_spec", lambda _: None)
    check_error(("--static", target), "Triton is not installed", capsys)

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(static, "find_spec", lambda _: Spec)
    missing = {"sm_90": "nvidia/bin/ptxas", "gfx942": "amd/compiler.py"}[target]
    check_error(("--static", target), f"this Triton has no {missing}", capsys)


def check_error(args: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr, exit code 2, nothing compiled."""
    with pytest.raises(SystemExit) as ended:
        group.main(["bench", "kernels", *args], prog_name="fusedstep")
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert words in err
    assert not out and "Traceback" not in err
