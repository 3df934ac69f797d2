"""However a command ends, nothing of it is left within ten seconds: real commands, real engines.

A few ends here; every command at every moment in every way, for an hour or more:

    .venv/bin/pytest tests/engine/test_orphans.py -m exhaustive

Made-up processes, and what is left without all this: tests/test_processes.py.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from orphans import Driver
from serving import FUSEDSTEP, free_port

LLM = str(Path(__file__).parents[1] / "llm_child.py")
SHAPE = {"num_hidden_layers": 2, "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SMALL = {
    "load_format": "dummy",
    "hf_overrides": SHAPE,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 26,
}
SMALL_ARGS = (
    *("--load-format=dummy", f"--hf-overrides={json.dumps(SHAPE)}", "--skip-tokenizer-init"),
    *("--enforce-eager", "--dtype=float32", "--max-model-len=512", "--max-num-seqs=8"),
    f"--kv-cache-memory-bytes={1 << 26}",
)
ENDS = ("SIGINT", "SIGTERM", "SIGHUP", "ctrl-c", "SIGKILL", "frozen", "EngineCore", "Worker")


@dataclass(frozen=True)
class Command:
    """A command, and a word of its log or a moment (see orphans.py) at which it is busy."""

    args: tuple[str, ...]
    busy: dict[str, Any]
    env: tuple[tuple[str, str], ...] = ()


def commands(model: str) -> dict[str, Command]:
    serve = (FUSEDSTEP, "serve", model, *SMALL_ARGS)
    up = {"word": "fusedstep serve is ready"}
    bench = (sys.executable, "-P", "-m")
    llm, two = {"model": model, **SMALL}, (("VLLM_CPU_OMP_THREADS_BIND", "0|1"),)
    said = {"word": "GENERATED"}
    return {
        "verify": Command((FUSEDSTEP, "verify", model), {"moment": "worker", "seconds": 5}),
        "latency": Command(
            (FUSEDSTEP, "bench", "latency", model, *SMALL_ARGS, "--batch-size=4", "--repeats=99"),
            {"moment": "turns"},
        ),
        "bench serve": Command(
            (
                *(FUSEDSTEP, "bench", "serve", model, "--num-prompts=8", "--output-len=32"),
                *("--concurrency=4", "--repeats=99"),
            ),
            {"moment": "turns"},
        ),
        "soak": Command(
            (*bench, "fusedstep.bench.soak", "--minutes=9"), {"moment": "worker", "seconds": 20}
        ),
        "gpu_check": Command(
            (*bench, "fusedstep.bench.gpu_check", "--device=cpu", "--tiny"), {"moment": "turns"}
        ),
        "serve": Command((*serve, f"--port={free_port()}"), up),
        "two servers": Command((*serve, f"--port={free_port()}", "--api-server-count=2"), up),
        "two workers": Command((*serve, f"--port={free_port()}", "-tp=2"), up, two),
        "LLM": Command((sys.executable, LLM, json.dumps(llm)), said),
        "LLM of two": Command(
            (sys.executable, LLM, json.dumps(llm | {"tensor_parallel_size": 2})), said, two
        ),
    }


# command, moment, end
SOME = (
    ("latency", "stopped", "frozen"),
    ("two servers", "busy", "SIGKILL"),
    ("LLM of two", "busy", "SIGHUP"),
    ("LLM", "busy", "EngineCore"),
    ("verify", "engine", "SIGTERM"),
)
MOMENTS = ("child", "engine", "worker", "busy")
ALL = [
    (command, moment, end)
    for command in commands("")
    for moment in MOMENTS
    for end in (ENDS if moment == "busy" else ENDS[:-2])
]


def run(root: Path, model: str, command: str, moment: str, end: str) -> Any:
    known = commands(model)[command]
    spec: dict[str, Any] = (
        {"moment": "said"} | known.busy if moment == "busy" else {"moment": moment}
    )
    folder = root / f"{command}-{moment}-{end}".replace(" ", "-")
    return Driver(folder, known.args, end, env=dict(known.env), **spec).result()


def check(result: Any) -> None:
    assert result["left"] == [] and result["files"] == [], result
    assert result["seconds"] < 10


@pytest.fixture(scope="module")
def ended(model: str) -> dict[Any, Any]:
    """What each of ``SOME`` leaves, two at a time. vLLM's sockets are in the folder: 107 bytes is
    all that a path may have, and pytest's are long where it runs in several streams."""
    with TemporaryDirectory(prefix="c") as folder, ThreadPoolExecutor(2) as pool:
        root = Path(folder)
        return dict(zip(SOME, pool.map(lambda case: run(root, model, *case), SOME), strict=True))


@pytest.mark.parametrize("case", SOME, ids=" ".join)
def test_nothing_is_left(ended: dict[Any, Any], case: tuple[str, str, str]) -> None:
    check(ended[case])


def test_a_signal_ends_a_command_with_its_exit_code_and_no_traceback(ended: dict[Any, Any]) -> None:
    result = ended["verify", "engine", "SIGTERM"]
    assert result["code"] == 130 and "Traceback" not in result["log"], result


@pytest.mark.exhaustive
@pytest.mark.parametrize(("command", "moment", "end"), ALL)
def test_in_every_way(
    tmp_path_factory: pytest.TempPathFactory, model: str, command: str, moment: str, end: str
) -> None:
    root = tmp_path_factory.mktemp("c")  # short: vLLM's sockets are in it, and 107 bytes is all
    check(run(root, model, command, moment, end))
