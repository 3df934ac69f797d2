"""Which implementation of the step operations is chosen, and what is refused."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fusedstep.ops.dispatch import load, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def installed(monkeypatch: pytest.MonkeyPatch, triton: bool) -> None:
    """Whether there is a Triton is up to the platform: the test says it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)


def test_native_on_the_cpu() -> None:
    assert resolve(CPU).name == "native"


def test_triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True)
    assert resolve(CUDA) == ("triton", "the device is a cuda")
    name, reason = resolve(CUDA, "native")
    assert name is None and "CPU" in reason


def test_nothing_on_cuda_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, False)
    name, reason = resolve(CUDA)
    assert name is None and "not installed" in reason


def test_triton_on_the_cpu_is_interpreted_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    name, reason = resolve(CPU, "triton")
    assert name is None and "TRITON_INTERPRET=1" in reason
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve(CPU, "triton").name == "triton"


def test_the_choice_can_be_forced() -> None:
    assert resolve(CPU, "reference") == ("reference", "forced by --ops")
    assert resolve(CPU, "native").name == "native"


@pytest.mark.parametrize("name", ["native", "reference"])
def test_load(name: str) -> None:
    assert load(name).__name__.lower() == f"{name}step"
