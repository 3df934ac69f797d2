"""One server for the whole session, and processes for engines one after the other.

In two streams, what shares them is one group, so that they are there once: each is GiBs and many
seconds of imports. Every other file is a group of its own.
"""

from __future__ import annotations

import ast
import shutil
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import features_child
import openai
import pytest
from engine_child import EngineChild
from features_child import CONFIG, OPTIONS, Ask, FeatureChild
from serving import FUSEDSTEP, KV_CACHE, SMALL, TOOLS, Server
from xdist.scheduler import LoadFileScheduling

SHARED = {"server": {"server", "client"}, "children": {"oracle", "fused", "compare", "both"}}


class Streams(LoadFileScheduling):
    """Whole files in several streams; those that take the same of ``SHARED`` are one group."""

    def _split_scope(self, nodeid: str) -> str:
        return group(self.config.rootpath, super()._split_scope(nodeid))


@cache
def group(root: Path, file: str) -> str:
    """The first of ``SHARED`` that a test or a fixture of the file takes; or the file itself."""
    functions = [
        node
        for node in ast.parse((root / file).read_text()).body
        if isinstance(node, ast.FunctionDef)
        and (node.name.startswith("test_") or node.decorator_list)
    ]
    taken = {parameter.arg for node in functions for parameter in node.args.args}
    return next((name for name, fixtures in SHARED.items() if fixtures & taken), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return Streams(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``fusedstep serve`` without MODEL; SIGINT to its main process alone ends it, cleanly."""
    server = Server(
        tmp_path_factory.mktemp("server") / "log",
        *(*SMALL, *KV_CACHE, *TOOLS),
        command=(FUSEDSTEP, "serve"),
    )
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, model: str) -> str:
    """Random weights, and the tokenizer of the bundled model."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model, file), folder)
    return str(folder)


@pytest.fixture(scope="session")
def stock() -> Iterator[EngineChild]:
    child = FeatureChild("off")
    yield child
    child.close()


@pytest.fixture(scope="session")
def oracle() -> Iterator[EngineChild]:
    """Stock vLLM's Model Runner V2, which promises a seed's tokens."""
    child = FeatureChild("oracle")
    yield child
    child.close()


@pytest.fixture(scope="session")
def fused() -> Iterator[EngineChild]:
    """Triton is interpreted from the start: speculative decoding needs more than our kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        child = FeatureChild("on")
        child.call(features_child.ready)
    yield child
    child.close()


@pytest.fixture
def compare(stock: EngineChild, fused: EngineChild, tiny: str) -> Any:
    """Ask both; answers must be the same. Returns fusedstep's result, with stock's in it."""

    def compare(asks: list[Ask], *, reset_at: int | None = None, **options: Any) -> Any:
        args = tiny, OPTIONS | options, asks, reset_at
        want = stock.call(features_child.ask, *args)
        have = fused.call(features_child.ask, *args)
        assert len(have["answers"]) == len(want["answers"]) == len(asks)
        for one, ours, theirs in zip(asks, have["answers"], want["answers"], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                for key in ("token_ids", "text", "finish_reason", "stop_reason"):
                    assert a[key] == b[key], (one, key)
        assert have["stored"] == want["stored"]
        have["stock"] = want
        return have

    return compare


@pytest.fixture
def both(stock: EngineChild, fused: EngineChild, tiny: str) -> Any:
    """Calls a function of ``features_child`` in both; (fusedstep's, stock's)."""

    def both(function: Any, options: dict[str, Any], *args: Any) -> tuple[Any, Any]:
        want = stock.call(function, tiny, OPTIONS | options, *args)
        return fused.call(function, tiny, OPTIONS | options, *args), want

    return both
