"""The counts of a worker since its start."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusedstep.counts import WindowCounts
from fusedstep.loop_forms import LoopForm

if TYPE_CHECKING:
    from fusedstep.vllm_plugin.runner.ranks import Ranks

logger = logging.getLogger("vllm.fusedstep")


@dataclass
class WorkerStats:
    """The worker's counts, which step operations run (``ops/dispatch.py``), and the loop's form."""

    ops: str | None
    loop: str = LoopForm.EAGER.value
    loop_reason: str = ""
    counts: WindowCounts = field(default_factory=WindowCounts)  # windows, steps, tokens
    ranks: Ranks | None = None
    stock_steps: Counter[str] = field(default_factory=Counter)  # by reason

    def add_stock_step(self, reason: str) -> None:
        """The first of each reason is logged."""
        if reason not in self.stock_steps:
            logger.info("fusedstep: stock step (%s)", reason)
        self.stock_steps[reason] += 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "ops": self.ops,
            "loop": self.loop,
            "loop_reason": self.loop_reason,
            "windows": self.counts.windows,
            "steps": self.counts.steps,
            "tokens": self.counts.tokens,
            "stock_steps": {str(reason): n for reason, n in self.stock_steps.items()},
            **({} if self.ranks is None else {"ranks": self.ranks.as_dict()}),
        }
