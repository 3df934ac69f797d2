"""Two workers, each with half of the model: every one runs the same steps of the same windows.

The model has sliding-window and full attention: two KV-cache groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_child
import pytest
from engine_child import EngineChild

CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 32,
    "initializer_range": 0.2,  # so wide that a wrong key shows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
REQUESTS: list[tuple[Any, dict[str, Any]]] = [
    ({"prompt_token_ids": prompt}, {"detokenize": False, "ignore_eos": True, **fields})
    for prompt, fields in (
        ([5, 9, 200, 7], {"temperature": 0.0, "max_tokens": 120}),
        ([77] * 9, {"temperature": 0.9, "seed": 3, "top_p": 0.9, "max_tokens": 70}),
        ([3, 1, 4, 1, 5], {"temperature": 1.2, "seed": 4, "logprobs": 2, "max_tokens": 40}),
        ([8] * 40, {"temperature": 0.7, "seed": 5, "frequency_penalty": 0.5, "max_tokens": 60}),
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights whose heads two workers can share."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Gemma3TextConfig(**CONFIG)).save_pretrained(folder)
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs the requests in a new engine of a kind; also returns what its windows were."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")

    def run(switch: str, arrive: dict[int, int]) -> tuple[Any, Any]:
        child = EngineChild(
            switch,
            str(folder),
            skip_tokenizer_init=True,
            tensor_parallel_size=2,
            max_model_len=256,
            max_num_seqs=8,
            block_size=16,  # half of the sliding window: blocks below it are given back
            kv_cache_memory_bytes=1 << 26,
        )
        try:
            result = child.call(engine_child.run, REQUESTS, arrive)
            assert child.call(engine_child.num_kv_cache_groups) == 2
            stats = child.call(engine_child.window_stats) if switch == "on" else None
        finally:
            child.close()
        return result["completions"], stats

    yield run


def test_equal_to_stock(run: Any) -> None:
    """Requests come while windows run: the ranks must agree on the step that ends one."""
    expected, _ = run("oracle", {})
    actual, stats = run("on", {2: 3, 3: 5})
    for want, have in zip(expected, actual, strict=True):
        assert [c["token_ids"] for c in have] == [c["token_ids"] for c in want]
    assert stats["windows"] > 2 and stats["steps"] > 2 * stats["windows"], stats
    assert set(stats["stock_steps"]) == {"prefill"}, stats
