"""Limits of Model Runner V2 for a request: the widths and number ranges of its tables.

Beyond them vLLM's worker raises, which ends the engine for everybody, or writes elsewhere. The
frontend refuses such a request with a client error; the scheduler asks again, for requests that
did not come through a frontend of ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from vllm import envs
from vllm.v1.worker.gpu.sample.logit_bias import (
    MAX_NUM_ALLOWED_TOKEN_IDS,
    MAX_NUM_LOGIT_BIAS_TOKENS,
    MAX_NUM_STOP_TOKEN_IDS,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams

INT32, INT64 = np.iinfo(np.int32), np.iinfo(np.int64)
FLOAT32 = np.finfo(np.float32)
MESSAGE = msgspec.msgpack.Encoder(enc_hook=repr)  # as vLLM encodes what its engine gets
LEAST, MOST = float(FLOAT32.tiny), float(FLOAT32.max)


class Refusal(NamedTuple):
    """``parameter``: the field of the request; ``words``: the limit."""

    parameter: str
    words: str


def fit_lengths(params: SamplingParams, max_model_len: int) -> None:
    """Bring lengths that no 32-bit cell holds down to ``max_model_len``, which ends them all."""
    highest = INT32.max - max_model_len  # the prompt's length is added
    if params.max_tokens is not None and params.max_tokens > highest:
        params.max_tokens = max_model_len
    if params.min_tokens > min(highest, params.max_tokens or highest):
        params.min_tokens = max_model_len


def refusal(
    params: SamplingParams | None, prompt_token_ids: Sequence[int] | None, model: ModelConfig
) -> Refusal | None:
    """The reason that the runner cannot hold this request, or None."""
    return next(_refusals(params, prompt_token_ids, model), None)


def _refusals(
    params: SamplingParams | None, prompt_token_ids: Sequence[int] | None, model: ModelConfig
) -> Iterator[Refusal]:
    vocab_size = model.get_vocab_size()
    if not model.supports_multimodal_inputs:  # their placeholders may lie outside
        yield from _outside("prompt", prompt_token_ids or (), vocab_size)
    if params is None:
        return
    yield from _adjustments(params, vocab_size)
    yield from _numbers(params)


def _adjustments(params: SamplingParams, vocab_size: int) -> Iterator[Refusal]:
    """Token ids that the sampler writes to, and how many it has room for."""
    allowed, bias = params.allowed_token_ids or (), params.logit_bias or {}
    yield from _more_than(MAX_NUM_ALLOWED_TOKEN_IDS, "allowed_token_ids", len(allowed))
    yield from _outside("allowed_token_ids", allowed, vocab_size)
    yield from _more_than(MAX_NUM_LOGIT_BIAS_TOKENS, "logit_bias", len(bias))
    yield from _outside("logit_bias", bias, vocab_size)
    if any(np.isnan(value) for value in bias.values()):
        yield Refusal("logit_bias", "must not be NaN")
    if params.min_tokens > 0:
        stops = params.all_stop_token_ids
        words = "stop token ids (with those of the model) beside min_tokens"
        yield from _more_than(MAX_NUM_STOP_TOKEN_IDS, "stop_token_ids", len(stops), words)
        yield from _outside("stop_token_ids", stops, vocab_size)
    bad_words = params.bad_words_token_ids or ()
    tokens = [token for word in bad_words for token in word]
    yield from _more_than(envs.VLLM_MAX_NUM_BAD_WORDS, "bad_words", len(bad_words), "token lists")
    yield from _more_than(envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS, "bad_words", len(tokens), "tokens")
    yield from _outside("bad_words", tokens, vocab_size)


def _numbers(params: SamplingParams) -> Iterator[Refusal]:
    """Values that have no place in the cell of their table, or in a message to the engine."""
    if params.seed is not None and not INT64.min <= params.seed <= INT64.max - params.n + 1:
        each = " for each of the n choices (seed, seed + 1, ...)" if params.n > 1 else ""
        yield Refusal("seed", f"must be a 64-bit integer{each}")
    if not LEAST <= params.repetition_penalty <= MOST:
        yield Refusal("repetition_penalty", "must be a 32-bit float above 0")
    numbers = {"top_k": params.top_k, "stream_interval": params.stream_interval}
    numbers["max_tokens"], numbers["min_tokens"] = params.max_tokens, params.min_tokens
    if params.repetition_detection is not None:
        numbers |= asdict(params.repetition_detection)
    yield from (refused for name, n in numbers.items() for refused in not_int64(name, n))


def not_int64(name: str, number: int | None) -> Iterator[Refusal]:
    """The engine's messages carry 64 bits."""
    if number is not None and not INT64.min <= number <= INT64.max:
        yield Refusal(name, "must be a 64-bit integer")


def no_message(*parts: object) -> Iterator[Refusal]:
    """Text that the engine's messages cannot carry: they are UTF-8."""
    try:
        MESSAGE.encode(parts)
    except UnicodeEncodeError:
        yield Refusal("the request", "must be UTF-8 text: half a surrogate pair is not")


def _more_than(limit: int, name: str, number: int, what: str = "entries") -> Iterator[Refusal]:
    if number > limit:
        yield Refusal(name, f"can have at most {limit} {what}, not {number}")


def _outside(name: str, token_ids: Collection[int], vocab_size: int) -> Iterator[Refusal]:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        yield Refusal(name, f"must have token ids from 0 to {vocab_size - 1} only")
