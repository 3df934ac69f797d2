"""Which implementation of the step operations runs on a device."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Choice(NamedTuple):
    """``name`` is None where nothing can run; ``reason`` says why this name, in words."""

    name: str | None
    reason: str


def resolve(device: torch.device, ops: str = "auto") -> Choice:
    """Choose for ``device``; an ``ops`` other than ``auto`` (see ``Options``) forces the choice."""
    name = ops
    if ops == "auto":
        name = "native" if device.type == "cpu" else "triton"
    if name == "triton" and (reason := _no_triton(device)):
        return Choice(None, reason)
    if name == "native" and device.type != "cpu":
        return Choice(None, f"the native step operations run on a CPU, not on {device.type}")
    return Choice(name, f"the device is a {device.type}" if ops == "auto" else "forced by --ops")


def load(name: str) -> Callable[..., Any]:
    """The class of an implementation: its instances are bound to a StepState."""
    if name == "reference":
        from fusedstep.ops.reference import ReferenceStep

        return ReferenceStep
    if name == "triton":
        from fusedstep.ops.triton_step import TritonStep

        return TritonStep
    from fusedstep.ops.native import NativeStep

    return NativeStep


def _no_triton(device: torch.device) -> str | None:
    """The reason that Triton kernels cannot run on ``device``, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on a CPU only interpreted, for tests: set TRITON_INTERPRET=1"
    return None
