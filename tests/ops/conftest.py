"""Which implementations the tests of the step operations hold against the reference."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from ops.world import Implementation

from fusedstep.ops.dispatch import load


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Native and interpreted Triton on the CPU, Triton on CUDA; macOS has no Triton."""
    on_cpu = metafunc.config.getoption("--device") == "cpu"
    if "implementation" in metafunc.fixturenames:
        names = ["native"] * on_cpu + ["triton"] * bool(find_spec("triton") or not on_cpu)
        metafunc.parametrize("implementation", names, indirect=True, scope="session")
    if "compiled" in metafunc.fixturenames:
        names = ["native" if on_cpu else "triton"]
        metafunc.parametrize("compiled", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def implementation(request: pytest.FixtureRequest, device: str) -> Implementation:
    """Step operations to hold against the reference."""
    return Implementation(request.param, load(request.param), device)


# The same where it runs at full speed: for what would take Triton's interpreter minutes.
compiled = implementation
