"""An engine with the Triton operations, and what records its steps on this device."""

from contextlib import nullcontext

import pytest
import torch
from window.engine import MAX_TOKENS, PROMPTS, Engine

from fusedstep.ops.dispatch import load
from fusedstep.window.arrivals import ArrivalCounter
from fusedstep.window.recorder import CudaRecorder


@pytest.fixture
def arrivals(tmp_path):
    counter = ArrivalCounter(f"test-{tmp_path.name}")
    counter.unlink()
    return counter


@pytest.fixture
def recorder(device, arrivals):
    if device == "cuda":
        return CudaRecorder(torch.device(device), arrivals)
    from window.tape import TapeRecorder  # which imports Triton: not before it is configured

    return TapeRecorder(arrivals)


@pytest.fixture
def engine(device):
    # The default stream cannot be recorded.
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()
    with torch.device(device), stream:
        yield Engine(load("triton"), PROMPTS, MAX_TOKENS, torch.device(device))
