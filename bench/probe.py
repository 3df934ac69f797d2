"""A vLLM ``worker_extension_cls``: lets a worker, stock or ours, tell about itself."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from fusedstep.bench import trace as gpu_trace

LOGITS_STD = 3.0  # of random weights: about a language model's


class WorkerProbe:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def watch_forwards(self) -> None:
        """Add up the time inside the model's forward, until ``look_away``."""
        self.forward_seconds, began = 0.0, 0.0

        def before(*_: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def after(*_: Any) -> None:
            self.forward_seconds += time.perf_counter() - began

        model = self.model_runner.get_model()
        self.hooks = (model.register_forward_pre_hook(before), model.register_forward_hook(after))

    def look_away(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def seconds_in_forward(self) -> float:
        """Since the last ``watch_forwards``; 0 before it."""
        return getattr(self, "forward_seconds", 0.0)

    def peak_rss_bytes(self) -> int:
        """Peak resident set size of this worker process."""
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def settle(self) -> None:
        """Return when the device has nothing left to do."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def watch_host(self) -> None:
        """Tell this thread's work from its waiting for the GPU, until ``stop_watching_host``."""
        self.waiting_seconds, self.host_thread = 0.0, threading.get_ident()
        self.unwatched = [
            (owner, name, getattr(owner, name))
            for owner, name in (
                (torch.cuda.Event, "synchronize"),
                (torch.cuda.Stream, "synchronize"),
                (torch.cuda, "synchronize"),
                (torch.accelerator, "synchronize"),
            )
        ]
        for owner, name, wait in self.unwatched:
            setattr(owner, name, self._timed(wait))

    def _timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.host_thread:
                return wait(*args, **kwargs)
            began = time.thread_time()
            try:
                return wait(*args, **kwargs)
            finally:
                self.waiting_seconds += time.thread_time() - began

        return timed

    def stop_watching_host(self) -> None:
        for owner, name, wait in self.unwatched:
            setattr(owner, name, wait)

    def host_seconds(self) -> float:
        """CPU time of this thread so far; while it is watched, without that of its waiting.

        A wait that torch does not show as one (a blocking copy) counts as work.
        """
        return time.thread_time() - getattr(self, "waiting_seconds", 0.0)

    def trace_kernels(self) -> None:
        """Record every kernel, until ``kernel_trace``."""
        self.trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.trace.start()

    def kernel_trace(self, num_steps: int) -> dict[str, Any]:
        """A ``gpu_trace.Trace`` since ``trace_kernels``, of a generate with so many steps."""
        torch.accelerator.synchronize()
        self.trace.stop()
        kernels = [
            (event.time_range.start, event.time_range.end, event.name)
            for event in self.trace.events()  # type: ignore[no-untyped-call]
            if event.device_type.name == "CUDA" and not event.is_user_annotation
        ]
        del self.trace
        return asdict(gpu_trace.summarise(kernels, num_steps))

    def randomise_weights(self, seed: int, vocab_size: int) -> int:
        """Normal weights in the place of vLLM's dummies; returns how many there are.

        With those (within 1e-3, norms too) attention hardly moves a logit: a wrong KV cache
        could give the right tokens. Linear layers keep the size of their inputs, norms are 1,
        biases 0, and the logits' standard deviation is LOGITS_STD.
        """
        count = 0
        generator = torch.Generator(self.model_runner.device).manual_seed(seed)
        with torch.inference_mode():
            for name, weight in self.model_runner.get_model().named_parameters():
                count += weight.numel()
                if weight.ndim == 1:
                    weight.fill_(0.0 if name.endswith("bias") else 1.0)
                    continue
                std = LOGITS_STD if weight.shape[0] >= vocab_size else 1.0
                weight.normal_(std=std * weight.shape[-1] ** -0.5, generator=generator)
        return count

    def engine_facts(self) -> dict[str, Any]:
        """Runner, CUDA graphs, scheduling, attention, dtype, and what windows' graphs take."""
        config = self.model_runner.vllm_config
        mode = config.compilation_config.cudagraph_mode
        backends = {
            g.backend.get_name() for groups in self.model_runner.attn_groups for g in groups
        }
        return {
            "runner": "v2" if config.use_v2_model_runner else "v1",
            "decode_graphs": "none" if mode is None else mode.decode_mode().name,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "attention": ", ".join(sorted(backends)),
            "dtype": str(self.model_runner.dtype).removeprefix("torch."),
            "graph_memory": getattr(self.model_runner, "graph_memory", {}),
        }
