"""What we refuse is what Model Runner V2 cannot hold: its own sampler is the oracle."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from fusedstep.ops.types import SamplingState
from fusedstep.vllm_plugin.reasons import PARAMETERS, request_reason
from fusedstep.vllm_plugin.request_limits import fit_lengths, refusal

VOCABULARY, LONGEST = 2000, 100
MODEL: Any = SimpleNamespace(
    get_vocab_size=lambda: VOCABULARY, max_model_len=LONGEST, supports_multimodal_inputs=False
)
I64, I32 = 1 << 63, 1 << 31


@pytest.fixture(scope="module")
def hold() -> Any:
    """Puts a request into a row of the tables; raises what ends an engine."""
    device = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffer_utils, "is_uva_available", lambda: False)  # no pinned memory here
        requests = RequestState(1, LONGEST, 64, 0, VOCABULARY, device)
        sampler = Sampler(VllmConfig(), 1, VOCABULARY, device, requests)

    def hold(params: SamplingParams) -> None:
        requests.free_indices[:] = [0]
        requests.add_request("0", 3, [1, 2, 3], 0, params.max_tokens)
        for index in range(params.n):
            one = params.clone()
            one.seed = None if params.seed is None else params.seed + index  # ParentRequest
            sampler.add_request(0, one)

    return hold


def asked(bad_words: list[list[int]] | None = None, **fields: Any) -> SamplingParams:
    params = SamplingParams(**fields)
    params._bad_words_token_ids = bad_words  # the tokenizer's part
    return params


ids = list(range(VOCABULARY))
# The last that fits, the first that does not, and the field that is named.
EDGES: dict[str, tuple[SamplingParams, SamplingParams, str]] = {
    "allowed": (
        asked(allowed_token_ids=ids[:1024]),
        asked(allowed_token_ids=ids[:1025]),
        "allowed_token_ids can have at most 1024 entries, not 1025",
    ),
    "bias": (
        asked(logit_bias=dict.fromkeys(ids[:1024], 1.0)),
        asked(logit_bias=dict.fromkeys(ids[:1025], 1.0)),
        "logit_bias can have at most 1024 entries, not 1025",
    ),
    "stops": (
        asked(stop_token_ids=ids[:128], min_tokens=1),
        asked(stop_token_ids=ids[:129], min_tokens=1),
        "stop_token_ids can have at most 128 stop token ids",
    ),
    "bad words": (
        asked([[1]] * 128),
        asked([[1]] * 129),
        "bad_words can have at most 128 token lists, not 129",
    ),
    "tokens of bad words": (
        asked([[1] * 8] * 128),
        asked([*[[1] * 8] * 127, [1] * 9]),
        "bad_words can have at most 1024 tokens, not 1025",
    ),
    "seed": (asked(seed=I64 - 1), asked(seed=I64), "seed must be a 64-bit integer"),
    "low seed": (asked(seed=-I64), asked(seed=-I64 - 1), "seed must be a 64-bit integer"),
    "seeds": (asked(seed=I64 - 2, n=2), asked(seed=I64 - 1, n=2), "for each of the n choices"),
}
# What only its kernels would find out, by writing outside of a row or with a NaN.
OUTSIDE = (
    (asked(allowed_token_ids=[VOCABULARY]), "allowed_token_ids must have token ids"),
    (asked(allowed_token_ids=[-1]), "allowed_token_ids must have token ids"),
    (asked(logit_bias={VOCABULARY: 1.0}), "logit_bias must have token ids"),
    (asked(logit_bias={1: float("nan")}), "logit_bias must not be NaN"),
    (asked(stop_token_ids=[VOCABULARY], min_tokens=1), "stop_token_ids must have token ids"),
    (asked([[1, VOCABULARY]]), "bad_words must have token ids from 0 to 1999 only"),
    (asked(repetition_penalty=1e300), "repetition_penalty must be a 32-bit float"),
    (asked(repetition_penalty=1e-300), "repetition_penalty must be a 32-bit float"),
    (asked(top_k=1 << 64), "top_k must be a 64-bit integer"),
    (
        asked(repetition_detection=RepetitionDetectionParams(1 << 64, 1, 2)),
        "max_pattern_size must be a 64-bit integer",
    ),
)


@pytest.mark.parametrize("case", EDGES)
def test_the_edge_is_the_runners(hold: Any, case: str) -> None:
    fits, does_not, words = EDGES[case]
    assert refusal(fits, [0], MODEL) is None
    hold(fits)
    refused = refusal(does_not, [0], MODEL)
    assert refused is not None and words in " ".join(refused)
    with pytest.raises((ValueError, OverflowError)):
        hold(does_not)


@pytest.mark.parametrize(("params", "words"), OUTSIDE, ids=[words for _, words in OUTSIDE])
def test_what_would_be_written_elsewhere(params: SamplingParams, words: str) -> None:
    refused = refusal(params, [0], MODEL)
    assert refused is not None and words in " ".join(refused)


@pytest.mark.parametrize("token", (-1, VOCABULARY, 1 << 40))
def test_prompts_of_known_tokens(token: int) -> None:
    refused = refusal(asked(), [0, token], MODEL)
    assert refused is not None and refused.parameter == "prompt"
    model: Any = SimpleNamespace(**vars(MODEL) | {"supports_multimodal_inputs": True})
    assert refusal(asked(), [0, token], model) is None


@pytest.mark.parametrize("tokens", (I32 - LONGEST, I32, I64, 1 << 70))
def test_lengths_beyond_every_end(hold: Any, tokens: int) -> None:
    params = asked(max_tokens=tokens, min_tokens=tokens)
    if tokens >= I32:
        with pytest.raises(OverflowError):
            hold(params)
    fit_lengths(params, LONGEST)
    assert params.max_tokens == params.min_tokens == LONGEST
    hold(params)


def test_lengths_that_fit_stay() -> None:
    params = asked(max_tokens=I32 - LONGEST - 1, min_tokens=5)
    fit_lengths(params, LONGEST)
    assert (params.max_tokens, params.min_tokens) == (I32 - LONGEST - 1, 5)


token_ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3)
integers = st.one_of(st.integers(), st.sampled_from((I32 - 1, I32, I64 - 1, I64, 1 << 64)))


@given(
    n=st.integers(1, 3),
    seed=st.none() | integers | integers.map(lambda n: -n),
    top_k=integers.map(abs),
    max_tokens=integers.map(lambda n: abs(n) + 1),
    min_share=st.integers(0, 3),
    repetition_penalty=st.floats(0, allow_infinity=False, exclude_min=True),
    logit_bias=st.none() | st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats()),
    allowed=st.none() | st.tuples(token_ids, st.sampled_from((1, 300, 600))),
    stops=st.tuples(st.integers(0, VOCABULARY - 130), st.sampled_from((0, 1, 127, 128, 129))),
    bad_words=st.none() | st.tuples(token_ids, st.sampled_from((1, 128, 129, 500))),
)
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_what_is_not_refused_is_held(hold: Any, **drawn: Any) -> None:
    allowed, (first, number), bad_words = (drawn.pop(n) for n in ("allowed", "stops", "bad_words"))
    drawn["min_tokens"] = drawn["max_tokens"] * drawn.pop("min_share") // 3
    params = asked(
        bad_words and [bad_words[0]] * bad_words[1],
        allowed_token_ids=allowed and allowed[0] * allowed[1],
        stop_token_ids=list(range(first, first + number)),
        **drawn,
    )
    fit_lengths(params, LONGEST)
    if refusal(params, [0], MODEL) is None:
        hold(params)


class Newer(SamplingParams, dict=True):  # type: ignore[call-arg]
    """Of a vLLM that can do something more."""

    surprise: int | None = None


def test_parameters_that_are_not_known_take_stock_steps() -> None:
    """All of this vLLM's are known."""
    fields = set(SamplingParams.__struct_fields__)
    assert fields <= PARAMETERS and PARAMETERS - fields <= SamplingState.parameters().keys()
    assert request_reason(Newer()) is None
    assert request_reason(Newer(surprise=1)) == "sampling parameter surprise"
