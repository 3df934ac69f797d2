"""Drafters of vLLM's: which of them windows go with, and what vLLM itself says of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
from scheduler.trace import Spec, Trace
from scheduler.world import STOCK, make_scheduler
from vllm.config.speculative import SpeculativeMethod

from fusedstep.vllm_plugin import reasons

TRACE = Trace((Spec((1, 2, 3), 0, 60),), num_drafts=3)


@pytest.fixture
def config() -> Any:
    """Of an engine that drafts by n-gram; a copy of it may be changed."""
    config: Any = make_scheduler(replace(TRACE, num_drafts=4), STOCK[True]).vllm_config
    spec = config.speculative_config
    config.speculative_config = object.__new__(type(spec))
    vars(config.speculative_config).update(vars(spec))
    return config


@pytest.mark.parametrize("method", sorted(set(get_args(SpeculativeMethod))))
def test_every_method_of_vllm_has_windows_or_its_name(
    config: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    config.speculative_config.method = method
    known = method in ("draft_model", "eagle", "eagle3", "mtp", "ngram", "ngram_gpu")
    expected = None if known else f"speculative decoding by {method}"
    assert reasons.engine_reason(config) == expected


@pytest.mark.parametrize("method", ["suffix", "medusa", "mlp_speculator", "custom_class"])
def test_drafters_of_the_older_runner(
    config: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM falls back to Model Runner V1 for them; the reason is the drafter all the same."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    config.speculative_config.method = method
    words = config._get_v2_model_runner_unsupported_features()
    assert words == [f"speculative method '{method}'"] and not config.use_v2_model_runner
    assert reasons.engine_reason(config) == f"speculative decoding by {method}"
