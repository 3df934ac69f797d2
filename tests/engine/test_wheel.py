"""The wheel, built from the sdist and installed with no source tree beside it: does it work?

Its environment sees this one's packages, but not fusedstep: an editable install is found by code
that only the environment it is made in runs.
"""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from packaging.metadata import Metadata
from serving import KV_CACHE, SMALL, Server
from trove_classifiers import classifiers

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = (".*", "__pycache__", "build", "dist", "*.egg-info")
PORTABLE = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
ENV = PORTABLE | {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and a folder to run its commands in."""

    sdist: Path
    wheel: Path
    env: Path
    cwd: Path

    @property
    def fusedstep(self) -> str:
        return str(self.env / "bin" / "fusedstep")

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.cwd,
            env=ENV,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def _output(process: subprocess.Popen[str]) -> str:
    """What a command prints to its stdout; it must succeed."""
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    return out


def _build(source: Path, what: str, out: Path) -> Path:
    """``build_sdist`` or ``build_wheel`` of the build backend, as pip calls it."""
    code = f"import setuptools.build_meta as b, sys; print(b.{what}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def _check_metadata(text: bytes) -> None:
    """What an index shows, and what pip reads of a wheel."""
    metadata = Metadata.from_email(text)  # raises for whatever is no metadata
    assert metadata.description == (ROOT / "README.md").read_text()
    assert metadata.description_content_type == "text/markdown"
    assert metadata.summary and metadata.author and metadata.keywords
    assert (metadata.license_expression, metadata.license_files) == ("Apache-2.0", ["LICENSE"])
    assert {"cpu", "cuda", "demo"} <= set(metadata.provides_extra or ())
    assert metadata.classifiers and not set(metadata.classifiers) - classifiers
    assert metadata.requires_python is not None
    minors = {f"3.{minor}" for minor in range(30)}
    python = "Programming Language :: Python :: "
    assert {c.removeprefix(python) for c in metadata.classifiers if c.startswith(python)} == {
        "3 :: Only",
        *metadata.requires_python.filter(minors),
    }


def _check_entry_points(text: str, names: set[str]) -> None:
    """They are pyproject.toml's, and each names a module of the wheel."""
    parser = configparser.ConfigParser(delimiters="=")
    parser.read_string(text)
    found = {group: dict(parser[group]) for group in parser.sections()}
    for value in (value for group in found.values() for value in group.values()):
        module = value.partition(":")[0].replace(".", "/")
        assert {f"{module}.py", f"{module}/__init__.py"} & names
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found == {"console_scripts": project["scripts"]} | project["entry-points"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    sdist = _build(source, "build_sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    wheel = _build(folder / sdist.name.removesuffix(".tar.gz"), "build_wheel", folder)
    env = folder / "env"
    venv.create(env, symlinks=True)
    site = next(env.glob("lib/python*/site-packages"))
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages.pth").write_text("".join(f"{path}\n" for path in packages))
    pip = [sys.executable, "-m", "pip", "--python", str(env / "bin" / "python")]
    pip += ["--disable-pip-version-check", "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(pip, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cwd = folder / "elsewhere"
    cwd.mkdir()
    return Installed(sdist, wheel, env, cwd)


@pytest.fixture(scope="module")
def verify(installed: Installed) -> Iterator[subprocess.Popen[str]]:
    """``verify`` of the prompts in the wheel: begun early, as two engines start meanwhile."""
    command = [installed.fusedstep, "verify", "--limit=2", "--max-tokens=8", "--json=-"]
    process = installed.start(*command, *SMALL, *KV_CACHE)
    yield process
    process.kill()


def test_wheel_and_sdist_hold_what_is_needed(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = set(wheel.namelist())
        about = {Path(name).name: wheel.read(name) for name in names if ".dist-info/" in name}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {f"{name.replace('.', '/')}/__init__.py" for name in packages["packages"]} <= names
    data = {n for n in names if not n.endswith(".py") and ".dist-info/" not in n}
    files = packages["package-data"].items()
    assert data == {f"{name.replace('.', '/')}/{file}" for name, of in files for file in of}
    assert "fusedstep/vllm_plugin/tried.json" in data  # what SUPPORTED follows from
    assert {name.partition("/")[0] for name in names} == {
        "fusedstep",
        f"{installed.wheel.name.split('-py3')[0]}.dist-info",
    }
    _check_metadata(about["METADATA"])
    _check_entry_points(about["entry_points.txt"].decode(), names)
    with tarfile.open(installed.sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "setup_env.py", "tests/conftest.py", "docs/policy.md"} <= files
    assert not [name for name in files if "__pycache__" in name]


def test_wheel_runs_where_no_source_is(
    installed: Installed, verify: subprocess.Popen[str], tmp_path: Path
) -> None:
    python = str(installed.env / "bin" / "python")
    server = Server(
        tmp_path / "log",
        *SMALL,
        *KV_CACHE,
        command=(installed.fusedstep, "serve"),
        env=ENV,
    )
    try:
        code = "import fusedstep.bench; print(fusedstep.bench.__file__)"
        where = Path(_output(installed.start(python, "-c", code)).strip())
        assert installed.env in where.parents
        diagnosis = json.loads(
            _output(installed.start(python, "-m", "fusedstep", "doctor", "--json=-"))
        )
        assert diagnosis["can_serve"]
        kernels = [installed.fusedstep, "bench", "kernels", "--device=cpu", "--case=greedy"]
        kernels += ["--vocab-size=128", "--batch-size=1", "--repeats=2", "--json=-"]
        rows = json.loads(_output(installed.start(*kernels)))["rows"]
        assert [(row["case"], row["num_different"]) for row in rows] == [("greedy", 0)]
        server.wait_until_up()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            model = client.models.list().data[0].id
            answer = client.completions.create(
                model=model, prompt="The capital of France is", max_tokens=8, temperature=0
            )
        assert "Paris" in answer.choices[0].text
    finally:
        server.kill()
    report = json.loads(_output(verify))
    assert (report["requests"], report["identical"]) == (2, 2)
    assert report["steps_per_window_mean"] > 1
