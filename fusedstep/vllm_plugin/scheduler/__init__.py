"""The engine core process: how long each window may be, and its accounts."""

from fusedstep.vllm_plugin.scheduler.scheduler import FusedStepScheduler

__all__ = ["FusedStepScheduler"]
