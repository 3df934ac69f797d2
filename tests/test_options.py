"""One frozen set of options: where each value comes from, and what is refused, in one line."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import click
import pytest

from fusedstep.cli.options import window_options
from fusedstep.errors import ConfigError
from fusedstep.options import LOOPS, OPS, ROPES, Options, flag
from fusedstep.policy import DecodeSteps
from fusedstep.vllm_plugin.launch import wiring

AUTO = {
    "decode_steps": "auto",
    "ops": "auto",
    "loop": "auto",
    "window_latency_ms": "50",
    "rope": "stock",
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AUTO:
        monkeypatch.delenv(f"FUSEDSTEP_{name.upper()}", raising=False)


def test_auto_unless_told_otherwise() -> None:
    assert Options.parse({}) == Options(DecodeSteps()) == Options.parse(AUTO)
    assert Options.parse({}).as_dict() == AUTO


@pytest.mark.parametrize(
    "given",
    (
        {"decode_steps": 7},
        {"decode_steps": "64", "ops": "reference"},
        *({"ops": ops} for ops in OPS),
        *({"loop": loop.upper()} for loop in LOOPS),
        *({"rope": rope} for rope in ROPES),
        {"window_latency_ms": 20},
        {"window_latency_ms": "0.5"},
    ),
    ids=str,
)
def test_parse_and_back(given: dict[str, object]) -> None:
    options = Options.parse(given)
    assert options.as_dict() == AUTO | {name: str(v).lower() for name, v in given.items()}
    assert Options.parse(options.as_dict()) == options


def test_the_environment_fills_in_what_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDSTEP_DECODE_STEPS", "9")
    monkeypatch.setenv("FUSEDSTEP_OPS", "reference")
    monkeypatch.setenv("FUSEDSTEP_LOOP", "")
    monkeypatch.setenv("FUSEDSTEP_WINDOW_LATENCY_MS", "7.5")
    assert Options.parse({"loop": None}) == Options(DecodeSteps(9), "reference", "auto", 7.5)
    given = {"decode_steps": "auto", "ops": "native", "window_latency_ms": 100}
    assert Options.parse(given) == Options(DecodeSteps(), "native", window_latency_ms=100.0)


@pytest.mark.parametrize(
    ("given", "words"),
    (
        ({"decode_steps": 0}, "from 1 to 64, not 0"),
        ({"ops": "fast"}, "ops must be one of auto, triton, native, reference, not 'fast'"),
        ({"loop": 3}, "loop must be one of auto, while, unrolled, replay, eager, not 3"),
        ({"loops": "eager"}, "no option loops of fusedstep: use decode_steps, ops, loop"),
        *(
            (
                {"window_latency_ms": wrong},
                f"must be a number of milliseconds above 0, not {wrong!r}",
            )
            for wrong in (0, -3, "soon", "nan", "inf")
        ),
    ),
    ids=str,
)
def test_wrong_values_are_one_line(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Options.parse(given)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDSTEP_OPS", "fast")
    with pytest.raises(ConfigError, match=r"^FUSEDSTEP_OPS must be one of auto"):
        Options.parse({}, flag)
    assert Options.parse({"ops": "auto"}).ops == "auto"


WRONG = {
    "decode_steps": "0",
    "ops": "fast",
    "loop": "for",
    "window_latency_ms": "soon",
    "rope": "on",
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_spell_an_option_as_the_user_did(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On the command line, in Python, in vLLM's additional_config, in the environment."""
    key = f'additional_config["fusedstep"]["{name}"]'
    options = Options.parse({}, flag)
    for spelled, parse in (
        (name, lambda: Options.parse({name: WRONG[name]})),
        ("--" + name.replace("_", "-"), lambda: Options.parse({name: WRONG[name]}, flag)),
        (
            key,
            lambda: wiring.engine_options(
                options, {"additional_config": {"fusedstep": {name: WRONG[name]}}}
            ),
        ),
        (f"FUSEDSTEP_{name.upper()}", lambda: Options.parse({}, flag)),
    ):
        if spelled.startswith("FUSEDSTEP"):
            monkeypatch.setenv(spelled, WRONG[name])
        with pytest.raises(ConfigError) as error:
            parse()
        assert str(error.value).startswith(f"{spelled} must be ")


def test_what_a_platform_has_not_is_spelled_as_the_user_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wiring, "is_cpu_build", lambda: True)
    given = {"additional_config": {"fusedstep": {"loop": "replay"}}}
    with pytest.raises(ConfigError, match=r'^additional_config\["fusedstep"\]\["loop"\] replay n'):
        wiring.engine_options(Options.parse({}, flag), given)
    with pytest.raises(ConfigError, match=r"must be an object, not 'x'"):
        wiring.engine_options(Options.parse({}), {"additional_config": {"fusedstep": "x"}})
    with pytest.raises(ConfigError, match=r"^--loop replay needs"):
        wiring.engine_options(Options.parse({"loop": "replay"}, flag), {"additional_config": {}})
    monkeypatch.setenv("FUSEDSTEP_LOOP", "replay")
    copied = pickle.loads(pickle.dumps(Options.parse({}, flag)))  # as it goes to an engine
    with pytest.raises(ConfigError, match=r"^FUSEDSTEP_LOOP replay needs a GPU"):
        wiring.engine_options(copied, {})


def test_the_shared_options_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is parsed once, what is not given is left to the environment; wrong values exit 2."""
    seen: list[Options] = []

    @click.command()
    @window_options
    def command(options: Options) -> None:
        seen.append(options)

    monkeypatch.setenv("FUSEDSTEP_LOOP", "eager")
    command(["--window-latency-ms", "12", "--decode-steps", "8"], standalone_mode=False)
    assert seen == [Options(DecodeSteps(8), "auto", "eager", 12.0)]
    done = subprocess.run(
        [sys.executable, "-c", CLI, "serve", "--window-latency-ms", "none"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and not done.stdout
    assert "error: --window-latency-ms must be a number of milliseconds above 0" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "on_cpu", "words"),
    (
        ({"loop": "eager", "ops": "native"}, True, None),
        ({"ops": "triton"}, True, None),
        ({"loop": "replay"}, True, "--loop replay needs a GPU; use eager or auto"),
        ({"loop": "replay", "ops": "triton"}, False, None),
        ({"loop": "while"}, False, None),
        ({"loop": "unrolled"}, True, "--loop unrolled needs a GPU; use eager or auto"),
        ({"ops": "reference"}, False, None),
        ({"ops": "native"}, False, "--ops native needs a CPU; use triton or auto"),
    ),
    ids=str,
)
def test_what_a_platform_has_not(given: dict[str, str], on_cpu: bool, words: str | None) -> None:
    options = Options.parse(given, flag)
    if words is None:
        options.check(on_cpu=on_cpu)
        return
    with pytest.raises(ConfigError) as error:
        options.check(on_cpu=on_cpu)
    assert str(error.value) == words


def test_engine_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's ``additional_config`` is the user's too: what is there stays and wins."""
    monkeypatch.setattr(wiring, "is_cpu_build", lambda: True)
    options = Options.parse({"decode_steps": 4, "ops": "reference"})
    given = {"seed": 3, "additional_config": {"x": 1, "fusedstep": {"decode_steps": 5}}}
    completed = wiring.engine_options(options, given)
    assert completed["seed"] == 3 and completed["additional_config"] == {
        "x": 1,
        "fusedstep": AUTO | {"decode_steps": "5", "ops": "reference"},
    }
    assert given["additional_config"]["fusedstep"] == {"decode_steps": 5}  # type: ignore[index]
    for wrong in ({"loop": "while"}, {"step": 2}):
        with pytest.raises(ConfigError):
            wiring.engine_options(options, {"additional_config": {"fusedstep": wrong}})


@pytest.mark.parametrize("on_cpu", (True, False))
def test_defaults_on_the_cpu(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    monkeypatch.setattr(wiring, "is_cpu_build", lambda: on_cpu)
    monkeypatch.setattr(wiring.demo, "find_made", lambda: Path("bundled"))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    compiled: dict[str, Any] = {"model": "bundled", "compilation_config": 3}
    for given in ({"model": "bundled"}, {"model": "other"}, compiled):
        eager = on_cpu and given == {"model": "bundled"}
        completed = wiring.cpu_defaults(given)
        assert completed.get("enforce_eager", False) == eager
        assert ("kv_cache_memory_bytes" in completed) == on_cpu
    sized = {"num_gpu_blocks_override": 7}
    assert wiring.cpu_defaults(sized) == sized


@pytest.mark.parametrize(
    ("installed", "is_cpu"), (("0.32.0", False), ("0.32.0+cpu", True), (None, True))
)
def test_the_cpu_build_is_known(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, is_cpu: bool
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(wiring, "version", version)
    assert wiring.is_cpu_build() == is_cpu


CLI = "from fusedstep.cli import main; main()"
CHILD = """
import json, os, sys
from fusedstep.errors import ConfigError
from fusedstep.options import Options
from fusedstep.vllm_plugin.launch import wiring
wiring.is_cpu_build = lambda: True
if "early" in sys.argv:
    wiring.switch_on(Options.parse({"ops": "triton"}))
if "import" in sys.argv:
    import triton.language
error = ""
try:
    wiring.engine_options(Options.parse({"ops": "triton"}), {})
except ConfigError as raised:
    error = str(raised)
print(json.dumps([error, os.environ.get("TRITON_INTERPRET")]))
"""


@pytest.mark.parametrize(
    ("args", "in_process", "too_late"),
    (
        (["import"], "0", True),
        (["import"], "1", False),  # the engine is a process of its own
        (["early", "import"], "0", False),
        ([], "0", False),
    ),
)
def test_triton_is_interpreted_from_its_import_on(
    monkeypatch: pytest.MonkeyPatch, args: list[str], in_process: str, too_late: bool
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", in_process)
    command = [sys.executable, "-c", CHILD, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    error, interpret = json.loads(done.stdout)
    assert interpret == "1"
    assert ("set TRITON_INTERPRET=1 before Python starts" in error) == too_late
    assert bool(error) == too_late and "\n" not in error
