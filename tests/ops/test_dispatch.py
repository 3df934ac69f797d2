"""Which implementation of the step operations is chosen, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fusedstep.errors import ConfigError
from fusedstep.ops.dispatch import ENV, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_native_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV, raising=False)
    assert resolve(CPU).name == "native"


def test_nothing_yet_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV, raising=False)
    name, reason = resolve(CUDA)
    assert name is None and "Triton" in reason
    assert resolve(CUDA, "native").name is None


def test_the_variable_forces_and_the_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, "reference")
    assert resolve(CPU).name == "reference"
    assert resolve(CPU, "native").name == "native"


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, "fast")
    with pytest.raises(ConfigError, match="native, reference, triton"):
        resolve(CPU)
