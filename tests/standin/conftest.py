"""The stand-in GPU in this process, for one test; engines for all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import engine_child
import pytest
import torch
from engine_child import EngineChild
from standin import graphs
from standin.device import GPU
from standin.mixture import ABORT, ARRIVE, MOST_STEPS, OPTIONS, REQUESTS, THREE
from standin.modes import on_device

from fusedstep.bench.gpu_check import models
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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model with random weights."""
    return str(models.load(models.TINY, tmp_path_factory.mktemp("tiny")).path)


@pytest.fixture(scope="session")
def cpu_engine(tiny_model: str) -> Iterator[EngineChild]:
    child = EngineChild("on", tiny_model, **OPTIONS)
    yield child
    child.close()


@pytest.fixture(scope="session")
def expected(cpu_engine: EngineChild) -> dict[str, Any]:
    """The mixture's results on a CPU, whose tokens other tests hold against stock vLLM's."""
    return cpu_engine.call(engine_child.run, REQUESTS, ARRIVE, ABORT, MOST_STEPS)


@pytest.fixture(scope="session")
def expected_of_three(cpu_engine: EngineChild) -> list[dict[str, Any]]:
    """The same for requests that come together, without logprobs and with some."""
    return [cpu_engine.call(engine_child.run, requests) for requests in THREE]
