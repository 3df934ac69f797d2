"""Options and fixtures that every test may use."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where tensors live in tests that take the fixture `device`",
    )


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
