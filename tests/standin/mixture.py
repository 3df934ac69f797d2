"""Requests of every kind at once, for engines that must give the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

TOKENS = {"detokenize": False, "ignore_eos": True, "max_tokens": 9}


def asked(length: int, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """A request whose prompt has so many tokens, all of them different. A longer prompt begins
    with a shorter one: blocks of its prefix are in the cache."""
    return {"prompt_token_ids": [3 + 7 * n % 1000 for n in range(length)]}, TOKENS | fields


# For three rows, so that each is used again: after a longer and after a shorter prompt, by
# requests that sample in another way. Prompts of more than 32 tokens are prefilled in chunks.
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
    asked(100, temperature=0.0, max_tokens=60),  # more than the model's length allows
    asked(25, temperature=1.0, seed=7, max_tokens=45),
    asked(12, temperature=0.0, max_tokens=80),  # aborted
    asked(70, temperature=0.9, seed=8),
    asked(30, temperature=0.8, seed=9, max_tokens=40),
    asked(7, temperature=0.0, logprobs=0, max_tokens=30),
]
# Requests that come together, greedy and seeded; the second time with logprobs.
THREE = [
    [asked(4 + n, temperature=n / 2, seed=n, logprobs=logprobs, max_tokens=20) for n in range(3)]
    for logprobs in (None, 2)
]
ARRIVE = {n: n for n in range(5, len(REQUESTS))}  # request -> engine step
ABORT = {14: 5}  # request -> tokens
MOST_STEPS = 1000  # of the engine; a request whose tokens are lost never ends
# Blocks of 32 tokens; five of them, beside vLLM's null block, do not hold three requests.
BLOCK_BYTES = 2 * 2 * 32 * 64 * 4  # of the tiny model in float32
OPTIONS = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 32,
    "block_size": 32,
    "kv_cache_memory_bytes": 6 * BLOCK_BYTES,
}


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Tokens and reasons are equal; logprobs nearly: the attention is another one."""
    for number, (ours, theirs) in enumerate(
        zip(got["completions"], expected["completions"], strict=True)
    ):
        (a,), (b,) = ours, theirs
        if number in ABORT:  # after which token depends on the windows
            n = min(len(a["token_ids"]), len(b["token_ids"]))
            assert n >= ABORT[number] and a["token_ids"][:n] == b["token_ids"][:n]
            continue
        for name in ("token_ids", "finish_reason", "stop_reason"):
            assert a[name] == b[name], (number, name)
        assert len(a["logprobs"] or ()) == len(b["logprobs"] or ()), number
        for step, other in zip(a["logprobs"] or (), b["logprobs"] or (), strict=True):
            assert step.keys() == other.keys(), number
            for token, (logprob, rank) in step.items():
                assert (pytest.approx(logprob, abs=1e-4), rank) == other[token], number
