"""Any vLLM's engine arguments, completed where FUSEDSTEP is on: no other option is needed.

Whatever starts an engine (``vllm serve``, ``vllm.LLM``, ``AsyncLLM``, vLLM's benchmarks, somebody's
framework) makes an ``EngineArgs``, which loads plug-ins, and asks it for the configuration.
"""

from __future__ import annotations

import difflib
import logging
import multiprocessing
import os
from dataclasses import MISSING, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

from fusedstep import processes
from fusedstep.errors import ConfigError, FusedStepError, Refused
from fusedstep.guardian import VARIABLE
from fusedstep.options import NAMES, Options, config_key
from fusedstep.vllm_plugin import compat, startup
from fusedstep.vllm_plugin.compat import SWITCH, Switch
from fusedstep.vllm_plugin.launch import wiring
from fusedstep.vllm_plugin.reasons import engine_reason

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = logging.getLogger("vllm.fusedstep")


def refuse(error: FusedStepError) -> NoReturn:
    """Raise ``error``: as it is under a command of ours, else as one line that ends the program."""
    if processes.folder() is not None:
        raise error
    raise Refused(str(error)) from None


def complete() -> None:
    """Let every ``EngineArgs`` of this process give a configuration with windows in it."""
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.create_engine_config
    if stock.__code__.co_filename == __file__:  # plug-ins are loaded more than once
        return

    @wraps(stock)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        as_given = vars(self).copy()
        try:
            completed = _complete(self)
        except FusedStepError as error:
            refuse(error)
        config = stock(self, *args, **kwargs)
        if not completed:
            return config
        reason = engine_reason(config) if compat.switch() is Switch.AUTO else None
        if reason is None:
            if as_given["worker_cls"] == "auto":  # not under our command, which tells it itself
                _tell(config)
            return config
        logger.warning("fusedstep: %s=auto leaves this engine as it is (%s)", SWITCH, reason)
        vars(self).update(as_given)
        if config.device_config.device_type == "cpu":
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # stock's, without our Triton
        return stock(self, *args, **kwargs)

    EngineArgs.create_engine_config = create_engine_config
    _tell_unknown_variables()


def _complete(args: EngineArgs) -> bool:
    """Set worker, scheduler and options; False where the engine is to stay as it is.

    Raises ConfigError or UnsupportedError for a mistake.
    """
    reason = _obstacle()
    if reason is not None:
        if compat.switch() is Switch.AUTO:
            logger.warning("fusedstep: %s=auto leaves vLLM as it is: %s", SWITCH, reason)
            return False
        raise ConfigError(reason)
    if _is_users(args):
        return False
    given = {field.name: getattr(args, field.name) for field in fields(args) if _given(args, field)}
    own = (given.get("additional_config") or {}).get("fusedstep") or {}
    options = Options.parse(own if isinstance(own, dict) else {}, config_key)
    completed = wiring.engine_options(options, given)
    for name, value in completed.items():
        setattr(args, name, value)
    return True


def _tell(config: VllmConfig) -> None:
    """One line: what a program that has not asked for us gets."""
    size = config.cache_config.kv_cache_memory_bytes
    logger.info(
        "fusedstep: %s=%s: decoding in windows (decode_steps %s)%s",
        SWITCH,
        compat.switch(),
        compat.options(config).decode_steps,
        f"; KV cache {size / wiring.GIB:.2f} GiB" if size else "",
    )


def _obstacle() -> str | None:
    """The reason that no engine of this process can have windows, and what to do, or None."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from fusedstep.vllm_plugin.cpu.platform import FusedStepCpuPlatform

        if not isinstance(current_platform, FusedStepCpuPlatform):
            return f"vLLM has chosen its platform already: set {SWITCH} before Python starts"
    elif not current_platform.is_cuda_alike():
        return f"windows need a CPU or a GPU with CUDA or ROCm: set {SWITCH}=off"
    return None


def _is_users(args: EngineArgs) -> bool:
    """Is worker or scheduler one of the user's own, which wins?"""
    scheduler: Any = args.scheduler_cls
    worker: Any = args.worker_cls
    if worker != "auto" and not compat.runs_windows(worker):
        name = worker if isinstance(worker, str) else "LLM(worker_cls=...)"
        logger.warning("fusedstep: no windows: your --worker-cls %s is used", name)
        return True
    if scheduler is not None and not compat.reserves_windows(scheduler):
        name = scheduler if isinstance(scheduler, str) else scheduler.__qualname__
        logger.warning("fusedstep: no windows: your --scheduler-cls %s is used", name)
        return True
    return False


def _given(args: EngineArgs, field: Any) -> bool:
    """Has somebody given this argument another value than vLLM's default?"""
    if field.default is not MISSING:
        return bool(getattr(args, field.name) != field.default)
    made = None if field.default_factory is MISSING else field.default_factory()
    return bool(getattr(args, field.name) != made)


def _tell_unknown_variables() -> None:
    """One line for each FUSEDSTEP_... that is ours by its name only, in the first process."""
    if multiprocessing.parent_process() is not None:
        return
    known = {f"{SWITCH}_{name.upper()}" for name in NAMES}
    ours = (VARIABLE, startup.REASON_FILE, *known)
    for name in sorted(os.environ):
        close = difflib.get_close_matches(name, known, n=1)
        if name.startswith(f"{SWITCH}_") and name not in ours and close:
            logger.warning("fusedstep: no variable %s: did you mean %s?", name, close[0])
