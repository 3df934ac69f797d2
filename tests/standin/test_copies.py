"""The engine where device memory is not host memory: what the host writes must be copied there.

On a CPU the step operations may read the host's own tensors, and a copy that is missing cannot be
seen. Here they read copies, as on a GPU.
"""

from __future__ import annotations

from typing import Any

import copies_child
import engine_child
from engine_child import EngineChild

from fusedstep.bench.gpu_check import models as gpu_models

TOKENS = {"detokenize": False, "ignore_eos": True, "max_tokens": 9}


def asked(length: int, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """A request whose prompt has so many tokens, all of them different."""
    return {"prompt_token_ids": [3 + 7 * n % 1000 for n in range(length)]}, TOKENS | fields


# Three rows, so that each is used again: after a longer and after a shorter prompt, by requests
# that sample in another way. Prompts of more than 32 tokens are prefilled in chunks.
REQUESTS = [
    asked(70, temperature=0.0),
    asked(20, temperature=1.1, seed=1, max_tokens=3),
    asked(5, temperature=0.9, seed=2, top_k=20, max_tokens=25),
    asked(3, temperature=0.0, max_tokens=1),
    asked(90, temperature=0.8, seed=3, top_p=0.7),
    asked(6, temperature=0.0, repetition_penalty=1.4, max_tokens=20),
    asked(40, temperature=1.2, seed=4, min_p=0.05),
    asked(9, temperature=0.0, logit_bias={17: 4.0, 99: -3.0}),
    asked(33, temperature=0.0, stop_token_ids=[5, 77, 200], min_tokens=4, ignore_eos=False),
    asked(4, temperature=0.7, seed=5, logprobs=2),
    asked(65, temperature=0.0, bad_words=[], allowed_token_ids=[4, 8, 15, 16, 23, 42]),
    asked(8, temperature=0.6, seed=6, frequency_penalty=0.5, presence_penalty=0.1),
]
ARRIVE = {n: n for n in range(5, len(REQUESTS))}


def test_tokens_where_the_host_s_memory_is_not_the_device_s(tmp_path: Any) -> None:
    model = gpu_models.load(gpu_models.TINY, tmp_path)
    child = EngineChild(
        "on",
        str(model.path),
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=3,
        max_num_batched_tokens=32,
        block_size=32,
        kv_cache_memory_bytes=1 << 24,
    )
    try:
        shared = child.call(engine_child.run, REQUESTS, ARRIVE)["completions"]
        assert child.call(copies_child.copy_what_the_host_writes) > 15
        for _ in range(2):
            assert child.call(engine_child.run, REQUESTS, ARRIVE)["completions"] == shared
        stats = child.call(engine_child.window_stats)
        child.call(copies_child.forget_to_copy)
        try:
            wrong = child.call(engine_child.run, REQUESTS, ARRIVE)["completions"]
        except AssertionError:  # also vLLM's: a token of a chunk that does not end the prompt
            wrong = None
        assert wrong != shared
    finally:
        child.close()
    assert stats["steps"] > 2 * stats["windows"]
    assert set(stats["stock_steps"]) == {"prefill"}
