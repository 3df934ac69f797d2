"""What test_copies.py runs in its engine's process (see engine_child.py)."""

from typing import Any
from unittest.mock import patch

import engine_child


def copy_what_the_host_writes() -> int:
    """Child: the runner's tables once more, of copies; how many there are."""
    import torch

    from fusedstep.vllm_plugin.runner import tables
    from fusedstep.vllm_plugin.runner.runner import FusedStepRunner

    class Copies(tables.StaticTensors):
        def __init__(self, device: torch.device) -> None:
            super().__init__(torch.device("cuda"))

    runner = engine_child.runner()
    config = runner.kv_cache_config
    with (
        patch.object(tables, "StaticTensors", Copies),
        patch.object(FusedStepRunner.__base__, "initialize_kv_cache", lambda *_: None),
    ):
        runner.initialize_kv_cache(config)
    return len(runner.tables.static._copies)


def forget_to_copy() -> None:
    """Child: the fault. Only windows refresh the copies, not the stock steps that prefill."""
    tables = engine_child.runner().tables
    refresh, stale = tables.static.refresh, tables.apply_staged_writes

    def apply_staged_writes() -> None:
        tables.static.refresh = lambda: None
        stale()
        tables.static.refresh = refresh

    tables.apply_staged_writes = apply_staged_writes
    step = engine_child.ENGINE.step
    left = iter(range(500))  # a request whose first token is lost never ends

    def limited() -> Any:
        assert next(left, None) is not None, "too many steps"
        return step()

    engine_child.ENGINE.step = limited
