"""One server for the whole session."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import openai
import pytest
from serving import KV_CACHE, SMALL, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``fusedstep serve`` without MODEL; SIGINT to its main process alone ends it, cleanly."""
    server = Server(tmp_path_factory.mktemp("server") / "log", *SMALL, *KV_CACHE)
    try:
        server.wait_until_up()
        yield server
        assert server.end(signal.SIGINT, group=False) in (0, 130)
    finally:
        server.kill()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        yield client
