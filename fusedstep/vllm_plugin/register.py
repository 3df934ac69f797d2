"""vLLM's entry points: cheap, idempotent, silent unless fusedstep is switched on.

The attention backend is there for plain vLLM too, by name; its module is imported when chosen.
"""

from __future__ import annotations

import copyreg
import logging
import os
from typing import Any

from fusedstep.vllm_plugin.compat import BACKEND, BACKEND_CLS, SWITCH, Switch, is_on

REGISTRY = "vllm.v1.attention.backends.registry"


def register() -> None:
    """``vllm.general_plugins``: called in every vLLM process, more than once.

    Raises Refused for a wrong FUSEDSTEP, or FUSEDSTEP=on beside a vLLM out of range.
    """
    from fusedstep import processes
    from fusedstep.errors import ConfigError, UnsupportedError
    from fusedstep.vllm_plugin import compat, startup
    from fusedstep.vllm_plugin.frontend import dead_engine, engine_args

    processes.belong()
    startup.report_failures()
    try:
        mode = compat.switch()
        compat.check_vllm_version()
    except ConfigError as error:
        engine_args.refuse(error)
    except UnsupportedError as error:
        if mode is compat.Switch.ON:
            engine_args.refuse(error)
        return  # plain vLLM of another version stays as it is
    attention_backend(BACKEND)
    if processes.folder() is not None:  # stock vLLM under a command of ours, too
        dead_engine.tell_who_waits()
    if compat.is_on():
        _switch_on()


def _switch_on() -> None:
    """Hang all that windows need into this process's vLLM."""
    from fusedstep.vllm_plugin import startup
    from fusedstep.vllm_plugin.compile_cache import leave_options_out
    from fusedstep.vllm_plugin.frontend import dead_engine, engine_args, engine_name, limits
    from fusedstep.vllm_plugin.frontend.unfold import unfold_windows
    from fusedstep.vllm_plugin.scheduler.door import announce_arrivals

    engine_args.complete()
    startup.hush_our_scheduler()
    dead_engine.tell_who_waits()
    limits.refuse_what_cannot_be_held()
    limits.refuse_ids_in_use()
    announce_arrivals()
    unfold_windows()
    engine_name.ask_the_engine()
    leave_options_out()


def platform() -> str | None:
    """``vllm.platform_plugins``: our CPU platform where vLLM is a CPU build, else None.

    vLLM resolves its platform before it looks for Triton, in every process, and before it changes
    the process's title: this is the place to give Triton its stand-in, and to belong to a command.
    """
    from fusedstep import processes

    processes.belong()
    oracle = os.environ.get(SWITCH) == Switch.ORACLE
    if not (oracle or is_on()):
        return None
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    from fusedstep.vllm_plugin.cpu import triton_stand_in as triton_cpu

    triton_cpu.install()
    name = "OracleCpuPlatform" if oracle else "FusedStepCpuPlatform"
    return f"fusedstep.vllm_plugin.cpu.platform.{name}"


def attention_backend(name: str) -> Any:
    """vLLM's enumeration member of this attention backend, with ours among them.

    A member is pickled as a call of this function: vLLM hands its options to a new process, which
    unpickles them before it loads plugins, and a member that only plugins know would be unknown.
    CUSTOM is ours unless another plugin has taken it.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not hasattr(AttentionBackendEnum, BACKEND):
        log = logging.getLogger(REGISTRY)
        level = log.level
        log.setLevel(logging.WARNING)  # it tells every process of every new name
        register_backend(BACKEND, BACKEND_CLS)
        log.setLevel(level)
        if not AttentionBackendEnum.CUSTOM.is_overridden():
            register_backend(AttentionBackendEnum.CUSTOM, BACKEND_CLS)
        copyreg.pickle(AttentionBackendEnum, _reduced)
    return AttentionBackendEnum[name]


def _reduced(member: Any) -> tuple[Any, tuple[str]]:
    return attention_backend, (member.name,)
