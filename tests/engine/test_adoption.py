"""FUSEDSTEP=on and nothing else: programs that have never heard of us decode in windows.

They are vLLM's own (`vllm bench latency`, `vllm bench throughput`, the API server) and a plain
script. tests/engine/test_examples.py has vLLM's API server with the openai client.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from serving import free_port
from tiny_commands import ENVIRONMENT

from fusedstep.vllm_plugin import compat
from fusedstep.vllm_plugin.launch import wiring

TESTS = Path(__file__).resolve().parent.parent
STOCK_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
BENCH = ("vllm.entrypoints.cli.main", "bench")
SHORT = ("--enforce-eager", "--dtype=float32", "--max-model-len=256")
Programs = dict[str, subprocess.Popen[str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without a word about fusedstep. vLLM's command asks for a package named vllm: it has one."""
    folder = tmp_path_factory.mktemp("packages")
    version = compat.vllm_version()
    named = folder / f"vllm-{version}.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    stock = {name: value for name, value in os.environ.items() if "FUSEDSTEP" not in name}
    return stock | {"PYTHONPATH": f"{folder}:{TESTS}", "VLLM_NO_USAGE_STATS": "1"}


def child(environment: dict[str, str], *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )


def output(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out[-4000:]
    return out


@pytest.fixture(scope="module")
def programs(
    environment: dict[str, str], tiny: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What their engines were, by the value of FUSEDSTEP; and the tokens of the plain script."""
    folder = tmp_path_factory.mktemp("programs")
    latency = (
        *(*BENCH, "latency", "--model", tiny, "--input-len=8", "--output-len=32"),
        *("--batch-size=2", "--num-iters-warmup=1", "--num-iters=2", *SHORT),
        # It takes token ids up to 10000.
        *("--disable-detokenize", "--load-format=dummy", "--hf-overrides", '{"vocab_size": 10240}'),
    )
    throughput = (
        *(*BENCH, "throughput", "--model", tiny, "--dataset-name=random", "--num-prompts=3"),
        *("--random-input-len=8", "--random-output-len=32", *SHORT),
    )
    script = (str(TESTS / "adoption_program.py"), tiny)
    running = {}
    for switch, lines in (("on", (latency, throughput, script)), ("", (script,))):
        tokens = str(folder / f"tokens{switch}")
        lines = (*lines[:-1], (*lines[-1], tokens))
        sized = {} if switch else {"VLLM_CPU_KVCACHE_SPACE": "1"}
        running[switch] = child(
            environment | ENVIRONMENT | sized | {"FUSEDSTEP": switch},
            str(TESTS / "adoption_child.py"),
            str(folder / f"engines{switch}"),
            *map(json.dumps, lines),
        )
    try:
        for process in running.values():
            output(process)
        yield {
            switch: json.loads((folder / f"engines{switch}").read_text())
            | {"tokens": json.loads((folder / f"tokens{switch}").read_text())}
            for switch in running
        }
    finally:
        for process in running.values():
            process.kill()


@pytest.mark.parametrize("number", range(3), ids=("bench latency", "bench throughput", "script"))
def test_a_program_decodes_in_windows(programs: dict[str, Any], number: int) -> None:
    (engine,) = programs["on"]["engines"][number]
    assert engine["worker"] == compat.WORKER_CLS and engine["scheduler"] == compat.SCHEDULER_CLS
    windows = engine["windows"]
    assert windows["steps"] > 4 * windows["windows"] > 0
    # vLLM would take 92 % of the machine, and not start where so much is not free.
    assert 0 < engine["kv_cache_memory_bytes"] <= wiring.DEFAULT_CPU_KV_CACHE_BYTES


def test_without_the_variable_the_same_tokens_come_from_stock(programs: dict[str, Any]) -> None:
    ((stock,),) = programs[""]["engines"]
    assert stock["worker"] == STOCK_WORKER and stock["scheduler"] == "None"
    assert stock["windows"] is None and programs[""]["ours"] == []
    assert programs[""]["tokens"] == programs["on"]["tokens"]


CASES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "plain": ({}, {}),
    "async": ({}, {"asynchronous": True}),
    "sized": ({}, {"num_gpu_blocks_override": 8}),
    "options": ({"FUSEDSTEP_DECODE_STEPS": "4"}, {"additional_config": {"x": 1}}),
    "given": ({}, {"additional_config": {"fusedstep": {"decode_steps": 5}}}),
    "own worker": ({}, {"worker_cls": "config_child.OwnWorker"}),
    "own scheduler": ({}, {"scheduler_cls": "config_child.OwnScheduler"}),
    "extension": ({}, {"worker_extension_cls": "config_child.OwnWorker"}),
    "auto": ({"FUSEDSTEP": "auto"}, {}),
    "auto, in vain": ({"FUSEDSTEP": "auto"}, {"pipeline_parallel_size": 2}),
    "on, in vain": ({}, {"pipeline_parallel_size": 2}),
    "value": ({"FUSEDSTEP_DECODE_STEPS": "banana"}, {}),
    "platform": ({"FUSEDSTEP_LOOP": "while"}, {}),
    "key": ({}, {"additional_config": {"fusedstep": {"decode_step": 5}}}),
    "kind": ({}, {"additional_config": {"fusedstep": 5}}),
}


@pytest.fixture(scope="module")
def configs(environment: dict[str, str], tiny: str) -> dict[str, Any]:
    """Of all cases with FUSEDSTEP=on; of some where it is off, left out or late."""
    stock = [case for name, case in CASES.items() if name in ("plain", "async", "own scheduler")]
    wanted = {
        "on": ({"FUSEDSTEP": "on", "FUSEDSTEP_DECODE_STEP": "3"}, list(CASES.values())),
        "off": ({"FUSEDSTEP": "off", "FUSEDSTEP_LOOP": "banana"}, stock),
        "left out": ({"FUSEDSTEP": "on", "VLLM_PLUGINS": "lora_filesystem_resolver"}, stock),
        "late": ({"FUSEDSTEP": "off"}, [({"FUSEDSTEP": "on"}, {}), ({"FUSEDSTEP": "auto"}, {})]),
    }
    running = {
        name: child(environment | given, str(TESTS / "config_child.py"), tiny, json.dumps(cases))
        for name, (given, cases) in wanted.items()
    }
    found = {name: json.loads(output(each).splitlines()[-1]) for name, each in running.items()}
    found["on"]["made"] = dict(zip(CASES, found["on"]["made"], strict=True))
    return found


@pytest.mark.parametrize(
    "name", ("plain", "async", "sized", "options", "given", "extension", "auto", "on, in vain")
)
def test_arguments_are_completed(configs: dict[str, Any], name: str) -> None:
    made = configs["on"]["made"][name]
    assert made["worker"] == compat.WORKER_CLS and made["scheduler"] == compat.SCHEDULER_CLS
    assert made["async"] and made["v2"]
    steps = {"options": "4", "given": "5"}.get(name, "auto")
    assert made["options"]["fusedstep"]["decode_steps"] == steps
    assert name != "options" or made["options"]["x"] == 1
    assert (made["kv_cache_memory_bytes"] is None) == (name == "sized")
    assert sum(f"decoding in windows (decode_steps {steps})" in line for line in made["said"]) == 1


def test_auto_leaves_an_engine_alone_that_would_run_no_windows(configs: dict[str, Any]) -> None:
    made = configs["on"]["made"]["auto, in vain"]
    assert made["worker"] == STOCK_WORKER and made["scheduler"] == "None"
    assert made["options"] == {} and made["kv_cache_memory_bytes"] is None and not made["v2"]
    assert "auto leaves this engine as it is (pipeline parallelism)" in made["said"][-1]


@pytest.mark.parametrize("name", ("own worker", "own scheduler"))
def test_what_a_user_names_wins(configs: dict[str, Any], name: str) -> None:
    made, given = configs["on"]["made"][name], CASES[name][1]
    assert made["worker"] == given.get("worker_cls", STOCK_WORKER)
    assert made["scheduler"] == str(given.get("scheduler_cls"))
    assert made["options"] == {}
    lines = [line for line in made["said"] if "no windows: your --" in line]
    assert len(lines) == 1 and next(iter(given.values())) in lines[0]


@pytest.mark.parametrize(
    ("name", "words"),
    (
        ("value", "FUSEDSTEP_DECODE_STEPS must be 'auto' or a number from 1 to 64, not 'banana'"),
        ("platform", "FUSEDSTEP_LOOP while needs a GPU; use eager or auto"),
        ("key", 'no option additional_config["fusedstep"]["decode_step"] of fusedstep: use'),
        ("kind", 'additional_config["fusedstep"] must be an object, not 5'),
    ),
)
def test_a_mistake_is_one_line_that_ends_the_program(
    configs: dict[str, Any], name: str, words: str
) -> None:
    made = configs["on"]["made"][name]
    assert (made["error"], made["code"]) == ("Refused", 2)
    assert made["words"].startswith(words) and f"fusedstep: {made['words']}" in made["stderr"]


def test_a_variable_that_nobody_knows_is_told_once(configs: dict[str, Any]) -> None:
    said = [line for made in configs["on"]["made"].values() for line in made["said"]]
    wanted = "fusedstep: no variable FUSEDSTEP_DECODE_STEP: did you mean FUSEDSTEP_DECODE_STEPS?"
    assert said.count(wanted) == 1


def test_off_is_vllm_as_it_comes(configs: dict[str, Any]) -> None:
    """The same as where vLLM is forbidden to load us, with a mistake that concerns nobody."""
    off, out = configs["off"], configs["left out"]
    assert off == out
    assert off["ours"] == [] and off["platform"] == "CpuPlatform"
    assert all(made["said"] == [] for made in off["made"])
    on = configs["on"]
    assert "EngineArgs.create_engine_config" in on["ours"] and len(on["ours"]) > 5
    assert on["platform"] == "FusedStepCpuPlatform"


def test_too_late_is_told(configs: dict[str, Any]) -> None:
    """A script sets the variable when vLLM has chosen its platform."""
    on, auto = configs["late"]["made"]
    words = "vLLM has chosen its platform already: set FUSEDSTEP before Python starts"
    assert (on["error"], on["words"], on["code"]) == ("Refused", words, 2)
    assert auto["worker"] == STOCK_WORKER
    assert auto["said"] == [f"fusedstep: FUSEDSTEP=auto leaves vLLM as it is: {words}"]


def test_vllms_server_refuses_in_one_line(environment: dict[str, str], tiny: str) -> None:
    given = {"FUSEDSTEP": "on", "FUSEDSTEP_WINDOW_LATENCY_MS": "0"}
    server = ("-m", "vllm.entrypoints.openai.api_server", "--model", tiny)
    process = child(environment | given, *server, "--port", str(free_port()))
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 2
    wanted = "FUSEDSTEP_WINDOW_LATENCY_MS must be a number of milliseconds above 0, not '0'"
    assert f"fusedstep: {wanted}" in out.splitlines() and "Traceback" not in out
