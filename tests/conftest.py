"""Options and fixtures that every test may use."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where tensors live in tests that take the fixture `device`",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU, Triton kernels run in Triton's interpreter, in this process only.

    Triton decides when it decorates a kernel, for its own library when it is first imported. The
    knob keeps the choice; child processes see no variable and are what they are without tests.
    """
    if config.getoption("--device") == "cpu" and find_spec("triton"):
        os.environ["TRITON_INTERPRET"] = "1"
        import triton

        triton.knobs.runtime.interpret = True
        ignored = "ignore::RuntimeWarning:triton.runtime.interpreter"  # inf - inf and the like
        config.addinivalue_line("filterwarnings", ignored)
    os.environ.pop("TRITON_INTERPRET", None)
    # A shell's background job ignores it, and so would every command that a test interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; what is printed here is for files


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Torch device of this run: "cpu", or "cuda" with ``--device cuda``."""
    name: str = request.config.getoption("--device")
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.fail("--device cuda: torch sees no CUDA device")
    return name


@pytest.fixture(scope="session")
def model() -> str:
    """Folder of the bundled model: real weights."""
    from fusedstep.demo import demo_model

    return str(demo_model())
