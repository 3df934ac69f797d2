"""Which implementation of the step operations runs on a device."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fusedstep.errors import ConfigError

ENV = "FUSEDSTEP_OPS"
NAMES = ("native", "reference", "triton")


class Choice(NamedTuple):
    """``name`` is one of NAMES, or None where nothing can run; ``reason`` says why, in words."""

    name: str | None
    reason: str


def resolve(device: torch.device, override: str | None = None) -> Choice:
    """Choose for ``device``; ``override``, or else the variable FUSEDSTEP_OPS, forces a choice.

    Raises ConfigError if the forced name is unknown.
    """
    source = "the argument" if override else ENV
    forced = override or os.environ.get(ENV) or None
    if forced is not None and forced not in NAMES:
        raise ConfigError(f"{source} asks for step operations {forced!r}; use {', '.join(NAMES)}")
    name = forced or ("native" if device.type == "cpu" else "triton")
    if name == "triton":
        return Choice(None, "the Triton step kernels are not built yet")
    if name == "native" and device.type != "cpu":
        return Choice(None, f"the native step operations run on a CPU, not on {device.type}")
    return Choice(name, f"forced by {source}" if forced else f"the device is a {device.type}")


def load(name: str) -> Callable[..., Any]:
    """The class of an implementation; it is bound to state tensors when it is called.

    ``name`` is one that ``resolve`` answers.
    """
    if name == "reference":
        from fusedstep.ops.reference import ReferenceStep

        return ReferenceStep
    from fusedstep.ops.native import NativeStep

    return NativeStep
