"""vLLM's frontend with our hooks, for one test."""

from __future__ import annotations

import pytest


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken away afterwards: other tests of this process want vLLM as it is."""
    from vllm.v1.engine import async_llm, core_client, llm_engine, output_processor

    from fusedstep.vllm_plugin.frontend.unfold import unfold_windows

    for owner, name in (
        (async_llm, "RequestOutputCollector"),
        (async_llm.AsyncLLM, "__init__"),
        (llm_engine.LLMEngine, "__init__"),
        (core_client.InprocClient, "get_output"),
        (core_client.SyncMPClient, "get_output"),
        (core_client.AsyncMPClient, "get_output_async"),
        (output_processor.OutputProcessor, "process_outputs"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    unfold_windows()
