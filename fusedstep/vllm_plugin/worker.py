"""The worker that builds FusedStepRunner, on the platform's own worker class (CPU or CUDA)."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from fusedstep.guardian import shared_memory
from fusedstep.processes import remove_at_end
from fusedstep.reasons import Reason
from fusedstep.vllm_plugin import stamps
from fusedstep.vllm_plugin.shared import trace_path

if current_platform.is_cpu():
    # First of all: it replaces torch's stream and event types on the CPU.
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

    from fusedstep.vllm_plugin.runner.tracing import TracedStep


class FusedStepWorker(PlatformWorker):  # type: ignore[misc]
    """vLLM's worker with FusedStepRunner in place of Model Runner V2.

    Where vLLM picks Model Runner V1 the worker is stock, and so is every step.
    """

    runs_windows = True  # FusedStepScheduler looks for this
    traced: TracedStep | None = None  # the step under way, of a turn that is traced

    def init_device(self) -> None:
        """vLLM 0.32's CPUWorker names its runner class inside this method: lend it ours.

        Python's garbage collector is told to leave alone what is imported by now. vLLM tells it the
        same once it is up, but until then calls it seven times, 0.4 s each.
        """
        gc.collect()
        gc.freeze()
        if not (current_platform.is_cpu() and self.use_v2_model_runner):
            super().init_device()
            return
        from vllm.v1.worker.cpu import model_runner as cpu_module

        from fusedstep.vllm_plugin.runner.runner import FusedStepRunner

        stock = cpu_module.CPUModelRunner
        cpu_module.CPUModelRunner = FusedStepRunner
        try:
            super().init_device()
        finally:
            cpu_module.CPUModelRunner = stock
        for path in shared_memory(os.getpid()):  # vLLM leaves it where a worker ends on a signal
            remove_at_end(Path(path))

    def _make_model_runner(self) -> Any:
        """The hook of vLLM's GPU worker."""
        if not self.use_v2_model_runner:
            return super()._make_model_runner()
        from fusedstep.vllm_plugin.runner.runner import FusedStepRunner

        return FusedStepRunner(self.vllm_config, self.device)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """vLLM's own; for a turn that is traced the times are taken down."""
        stamp = stamps.trace_of(scheduler_output)
        if stamp is None or not self.is_driver_worker:
            return super().execute_model(scheduler_output)
        from fusedstep.vllm_plugin.runner.tracing import TracedStep

        rank = self.vllm_config.parallel_config.data_parallel_index
        self.traced = step = TracedStep(trace_path(self.vllm_config, rank), stamp, self.device)
        output = super().execute_model(scheduler_output)
        step.end("execute")
        if output is not None:  # nothing was scheduled
            self.traced = None
            step.write(reason="")
        return output

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        step = self.traced
        if step is None:
            return super().sample_tokens(grammar_output)
        self.traced = None
        step.begin("sample")
        output = super().sample_tokens(grammar_output)
        step.end("sample")
        if hasattr(output, "tell"):  # a window: its tokens are still to come
            output.tell(step)
        else:
            step.write(reason=getattr(self.model_runner, "reason", Reason.MODEL_RUNNER_V1))
        return output

    def execute_dummy_batch(self) -> None:
        """No request of this rank decodes: it joins the others, for as many steps as they run."""
        ranks = getattr(self.model_runner, "ranks", None)
        if ranks is None:
            super().execute_dummy_batch()
        else:
            ranks.join(super().execute_dummy_batch)

    def no_windows_reason(self) -> str | None:
        """The reason that this worker runs no windows, for its scheduler, or None."""
        return getattr(self.model_runner, "stock_steps_reason", None)

    def window_stats(self) -> dict[str, Any]:
        """Counts since start: windows, steps, tokens, and stock steps by reason."""
        stats = getattr(self.model_runner, "stats", None)
        return {} if stats is None else stats.as_dict()

    def use_loop(self, loop: str) -> dict[str, Any]:
        """Another form of the loop (one of ``options.LOOPS``), between requests: to compare them.

        Returns the statistics, which name the form that runs now, and why.
        """
        use_form = getattr(self.model_runner, "use_form", None)
        if use_form is not None:  # not vLLM's own runner
            use_form(loop)
        return self.window_stats()

    def attention_backend(self) -> str:
        """Name of the first attention group's backend, for people."""
        groups = [g for group in self.model_runner.attn_groups for g in group]
        return str(groups[0].backend.get_name()) if groups else "none"
