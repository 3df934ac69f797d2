"""Inside a ``features_child.FeatureChild``: KV connectors, and the controls of their tests."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import engine_child
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


def ask_and_send(
    model: str, options: dict[str, Any], asks: list[Ask], keep: bool = True
) -> dict[str, Any]:
    """``ask``, and steps until the connector has sent all. Not ``keep``: blocks that are being
    sent get free at once."""
    from late_kv import SendingConnector

    def take_all(self: Any, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        in_full(self, request, block_ids)
        return False, None

    def say_nothing(self: Any, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        return None, get_finished(self, finished_req_ids)[1]

    in_full, get_finished = SendingConnector.request_finished, SendingConnector.get_finished
    with ExitStack() as faults:
        if not keep:
            change = partial(patch.object, SendingConnector)
            faults.enter_context(change("request_finished", take_all))
            faults.enter_context(change("get_finished", say_nothing))
        result = ask(model, options, asks)
        for _ in range(20):  # a control has requests that nobody knows of
            engine_child.ENGINE.step()
    assert not engine_child.scheduler().has_requests()
    return result
