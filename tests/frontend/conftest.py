"""vLLM's frontend with our hooks, for one test; servers of the scripted model, for all."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from serving import KV_CACHE, Server


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


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """All of them, started side by side. vLLM's several API servers do not end without noise."""
    from frontend import scripted
    from frontend.scripted_servers import ARGS, AT, STARTS, WORDS, WORDS_AT
    from frontend.stream import tokenizer, tokens

    folder = tmp_path_factory.mktemp("scripted")
    words = tokenizer().encode(WORDS, add_special_tokens=False)
    scripts = {length: tokens(name) for name, length in AT.items()} | {WORDS_AT: words}
    scripted.make(folder / "model", scripts)
    with ExitStack() as stack:
        found = {}
        for name, args in STARTS.items():
            server = Server(folder / name, str(folder / "model"), *ARGS, *KV_CACHE, *args)
            stack.callback(server.kill)
            found[name] = server
        for server in found.values():
            server.wait_until_up()
        yield found
        for server in (found["stock"], found["deepseek_v31"]):
            assert server.end(signal.SIGINT, group=False) in (0, 130)
