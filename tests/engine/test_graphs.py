"""Recorded windows of a real vLLM engine: its model on tapes, its scheduler, its requests.

CUDA graphs without CUDA (``window/tape.py``): the attention and the step operations are our Triton
kernels, interpreted; what vLLM calls between them are torch operations. Whatever Python decided
while a step was recorded is decided for good, as in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import engine_child
import pytest
from engine_child import EngineChild

from fusedstep.bench.gpu_check import models as gpu_models

REQUESTS: list[tuple[Any, dict[str, Any]]] = [
    ({"prompt_token_ids": prompt}, {"detokenize": False, "ignore_eos": True, **fields})
    for prompt, fields in (
        ([5, 9, 200, 7], {"temperature": 0.0, "max_tokens": 17}),
        ([77] * 9, {"temperature": 0.9, "seed": 3, "max_tokens": 9}),
        ([3, 1, 4, 1, 5], {"temperature": 1.2, "seed": 4, "top_p": 0.9, "max_tokens": 11}),
        ([8] * 20, {"temperature": 0.7, "seed": 5, "logprobs": 2, "max_tokens": 3}),
    )
]


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineChild]:
    model = gpu_models.load(gpu_models.TINY, tmp_path_factory.mktemp("models"))
    child = EngineChild(
        "on",
        str(model.path),
        ops="triton",
        attention_backend="FUSEDSTEP",
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=4,
        block_size=16,
        kv_cache_memory_bytes=1 << 24,
    )
    yield child
    child.close()


@pytest.fixture(scope="module")
def eager(child: EngineChild) -> list[Any]:
    return tokens(child)


def tokens(child: EngineChild) -> list[Any]:
    """Two requests come while the others run; the last one wants logprobs for a while."""
    result = child.call(engine_child.run, REQUESTS, {2: 2, 3: 3})
    return [[c["token_ids"] for c in completions] for completions in result["completions"]]


@pytest.mark.parametrize("form", ["replay", "unrolled", "while"])
def test_tokens_are_those_of_the_eager_loop(
    child: EngineChild, eager: list[Any], form: str
) -> None:
    chosen = child.call(engine_child.record_on_tapes, form)
    can_end = form != "unrolled"
    assert chosen == {"loop": form, "reason": "on tapes", "scheduler can end it": can_end}
    assert tokens(child) == eager
    assert child.call(engine_child.count_replays) >= 2
