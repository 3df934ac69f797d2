"""Origin of a figure: versions, device, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fusedstep.options import Options
from fusedstep.vllm_plugin import compat


def describe(model: str, options: Options, vllm_args: tuple[str, ...]) -> dict[str, Any]:
    """Everything that a reader needs to compare a row with their own."""
    engine = {"model": Path(model).name, "options": list(vllm_args)}
    return machine() | engine | options.as_dict()


def machine() -> dict[str, Any]:
    """The part that no engine has to do with."""
    return {
        "device": device_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": compat.vllm_version(),
        "fusedstep": version("fusedstep"),
        "git_sha": git_sha(),
    }


def device_name() -> str:
    """Name of the GPU, else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_sha() -> str | None:
    """Commit of this checkout, with + when it has changes; None outside one."""
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
