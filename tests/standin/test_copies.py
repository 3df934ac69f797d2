"""The engine where device memory is not host memory: what the host writes must be copied there.

On a CPU the step operations may read the host's own tensors, and a copy that is missing cannot be
seen. Here they read copies, as on a GPU.
"""

from __future__ import annotations

from typing import Any

import copies_child
import engine_child
import pytest
from engine_child import EngineChild
from standin.mixture import ABORT, ARRIVE, REQUESTS, assert_same


@pytest.mark.usefixtures("expected_of_three")  # asked of the engine before
def test_tokens_where_the_host_s_memory_is_not_the_device_s(
    cpu_engine: EngineChild, expected: dict[str, Any]
) -> None:
    """The last user of the engine: what it does to it stays."""
    run = engine_child.run, REQUESTS, ARRIVE, ABORT
    assert cpu_engine.call(copies_child.copy_what_the_host_writes) > 15
    for _ in range(2):
        assert_same(cpu_engine.call(*run), expected)
    stats = cpu_engine.call(engine_child.window_stats)
    cpu_engine.call(copies_child.forget_to_copy)
    with pytest.raises(AssertionError):  # also vLLM's: a token of a chunk that ends no prompt
        assert_same(cpu_engine.call(*run), expected)
    assert stats["steps"] > 2 * stats["windows"]
    assert set(stats["stock_steps"]) == {"prefill"}
