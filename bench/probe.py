"""What a worker can tell about itself, stock or ours: a vLLM ``worker_extension_cls``."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any


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
