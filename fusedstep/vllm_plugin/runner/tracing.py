"""The worker's part of a trace: when the host staged and launched a step or a window, and when
its tokens had come."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from fusedstep.vllm_plugin.stamps import TraceStamp
from fusedstep.window import tracing


class TracedStep:
    """One call of ``execute_model`` and of ``sample_tokens``, for a turn that is traced."""

    def __init__(self, page: Path, stamp: TraceStamp, device: torch.device) -> None:
        self.page, self.stamp = page, stamp
        self.on_host = device.type == "cpu"  # the device's work is over when a call returns
        self.record: dict[str, Any] = {"kind": "step", "turn": stamp.turn}
        self.begin("execute")

    def begin(self, name: str) -> None:
        self.record[name] = [time.monotonic_ns()]

    def end(self, name: str) -> None:
        self.record[name].append(time.monotonic_ns())

    def write(self, *, reason: str | None, has_tokens: bool = False) -> None:
        """``reason``: of a stock step, empty where nothing was scheduled; None for a window.

        ``has_tokens``: the host has the tokens, so the device's work is over.
        """
        ready = self.record.get("sample", [0])[-1] if self.on_host else time.monotonic_ns()
        known = self.on_host or has_tokens
        self.record |= {"reason": reason, "ready": ready if known else None}
        tracing.append(self.page, self.stamp.file, self.record)
