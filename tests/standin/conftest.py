"""The stand-in GPU in this process, for one test."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from standin import graphs
from standin.device import GPU
from standin.modes import on_device

from fusedstep.window import recorder
from fusedstep.window.arrivals import ArrivalCounter


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work is done as late as possible; with a seed as parameter, at random times."""
    GPU.__init__()  # type: ignore[misc]
    seed = getattr(request, "param", None)
    GPU.random = None if seed is None else random.Random(seed)
    graphs.install(monkeypatch.setattr)
    monkeypatch.setattr(recorder, "Driver", graphs.Driver)
    stream = graphs.Stream()
    with torch.inference_mode(), on_device(), stream:
        yield


@pytest.fixture
def arrivals(tmp_path: object) -> ArrivalCounter:
    counter = ArrivalCounter(f"standin-{id(tmp_path)}")
    counter.unlink()
    return counter
