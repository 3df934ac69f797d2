"""Inside a ``features_child.FeatureChild``: a KV connector that windows do not wait for."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from features_child import Ask, ask


def ask_with_loads_in_windows(
    model: str, options: dict[str, Any], asks: list[Ask], hooks: bool
) -> dict[str, Any]:
    """``ask`` without the stock steps that KV connectors get for their loads.

    Without ``hooks`` windows do not tell the connector that they begin and end.
    """
    from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR

    from fusedstep.vllm_plugin.runner.runner import FusedStepRunner
    from fusedstep.vllm_plugin.scheduler.admission import Admission

    in_full = FusedStepRunner.sample_tokens

    def sample_tokens(runner: Any, grammar_output: Any) -> Any:
        connector = runner.kv_connector
        if runner.staged is not None and not hooks:
            runner.kv_connector = NO_OP_KV_CONNECTOR
        output = in_full(runner, grammar_output)
        runner.kv_connector = connector
        return output

    with (
        patch.object(FusedStepRunner, "sample_tokens", sample_tokens),
        patch.object(Admission, "awaits_kv", False),
    ):
        return ask(model, options, asks)
