"""Speculative rounds in windows: stock vLLM's tokens, and its counts of drafts, by each drafter.

Stock is vLLM's own Model Runner V2 with the same drafter: a seed's tokens depend on the drafts.
Its kernels for drafts run in Triton's interpreter here, so the models are of few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import speculation_child
import tiny_models
from engine_child import EngineChild, assert_logprobs
from features_child import FeatureChild, ready
from standin_child import StandInChild

OPTIONS: dict[str, Any] = {
    "max_model_len": 96,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 160,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 22,
    "skip_tokenizer_init": True,
    "max_logprobs": -1,
}
PROMPTS = [[3, 4, 5, 3, 4, 5, 3, 4], [7] * 20, [1, 9, 2, 8, 3], [30, 31, 4], [6, 5, 4, 3, 2] * 9]


def asked(number: int, at: int = 0, **fields: Any) -> tuple[list[int], dict[str, Any], int]:
    return PROMPTS[number], {"max_tokens": 30, "ignore_eos": True} | fields, at


# More than there are rows; ends at a stop token, at max_tokens inside a round, at max_model_len.
REQUESTS = [
    asked(0, max_tokens=41),
    asked(1, temperature=0.7, seed=1),
    asked(2, stop_token_ids=[11, 12, 13], max_tokens=60),
    asked(3, at=3, temperature=0.7, seed=2, top_k=5),
    asked(4, at=5, max_tokens=100),
    asked(0, at=8, temperature=1.0, seed=3, stop_token_ids=[20, 21], min_tokens=8),
    asked(2, at=9, repetition_penalty=1.3, presence_penalty=0.2, max_tokens=23),
    asked(1, at=9, max_tokens=1),
    asked(3, at=12, temperature=0.9, seed=4, frequency_penalty=0.5, max_tokens=2),
    asked(1, at=13, logprobs=2, max_tokens=26),
    asked(4, at=14, temperature=0.8, seed=5, logprobs=0, stop_token_ids=[9, 10]),
    asked(2, at=20, temperature=0.6, seed=6, top_p=0.9, logprobs=-1, max_tokens=19),
]
GREEDY = [n for n, (_, fields, _) in enumerate(REQUESTS) if "temperature" not in fields]
METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"prompt_lookup_max": 3, "prompt_lookup_min": 1},
    "draft_model": {"model": "draft"},
    "drawn": {  # its drafts are drawn, and verified with their logits
        "method": "draft_model",
        "model": "draft",
        "draft_sample_method": "probabilistic",
    },
    "eagle": {"model": "eagle"},
    "eagle3": {"model": "eagle3"},
    "mtp": {},
}
ONE = {"one": {"method": "eagle", "model": "eagle", "num_speculative_tokens": 1}}
TARGETS = {"mtp": "mimo"}  # others: "target"

# Windows alone, as far from max_model_len. Three at a time: at first no one asks for more than
# temperature and seeds, then for truncation, then for all that drafts allow.
PLAIN = [
    asked(0, max_tokens=41),
    asked(1, temperature=0.7, seed=1),
    asked(2, stop_token_ids=[11, 12, 13], max_tokens=50),
    asked(3, at=12, temperature=1.0, seed=2, top_k=5, top_p=0.9),
    asked(4, at=14, max_tokens=30),
    asked(2, at=18, temperature=0.5, seed=5, stop_token_ids=[20, 21], max_tokens=23),
    asked(0, at=24, repetition_penalty=1.3, presence_penalty=0.2, max_tokens=23),
    asked(1, at=26, temperature=0.9, seed=4, frequency_penalty=0.5),
    asked(
        3,
        at=28,
        stop_token_ids=list(range(0, 32, 2)),
        min_tokens=9,
        top_k=7,
        seed=6,
        temperature=0.8,
    ),
    asked(4, at=30, allowed_token_ids=list(range(3, 31, 2)), max_tokens=25),
    asked(0, at=32, bad_words_token_ids=[[9], [4, 5], [7, 7, 7]], max_tokens=27),
]

# Of vLLM: for one row of four tokens, and for three, one of which may be padding.
GRAPHS: dict[str, Any] = {"ops": "triton", "capture_sizes": (4, 12, 32)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return speculation_child.make_models(tmp_path_factory.mktemp("speculation"))


@pytest.fixture(scope="module")
def stock() -> Iterator[EngineChild]:
    """Model Runner V2, interpreting what has no stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        child = FeatureChild("oracle")
        child.call(ready)
    yield child
    child.close()


@pytest.fixture(scope="module")
def wanted(stock: EngineChild, models: dict[str, str]) -> Callable[[str], dict[str, Any]]:
    """Stock's answers with a drafter."""

    @cache
    def of(method: str) -> dict[str, Any]:
        options = with_drafts(models, method)
        target = target_of(models, method)
        want: dict[str, Any] = stock.call(speculation_child.run, target, options, REQUESTS)
        accepted = [n for _, numbers in filter(None, want["drafts"]) for n in numbers]
        assert 0.05 < sum(accepted) / (3 * len(accepted)) < 0.95, "drafts hold now and then"
        return want

    return of


@pytest.fixture(scope="module")
def stand_in(models: dict[str, str]) -> Iterator[StandInChild]:
    """On the stand-in GPU; ``accept`` is Triton's, interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        child = StandInChild(models["target"], GRAPHS, **with_drafts(models, "draft_model"))
        child.call(ready)
    yield child
    child.close()


def target_of(models: dict[str, str], method: str) -> str:
    return models[TARGETS.get(method, "target")]


def with_drafts(models: dict[str, str], method: str) -> dict[str, Any]:
    asked = (METHODS | ONE)[method.removesuffix("_gpu")]
    config = {"method": method, "num_speculative_tokens": 3} | asked
    if "model" in config:
        config["model"] = models[config["model"]]
    return OPTIONS | {
        "speculative_config": config,
        "per_request_spec_decode_metrics": "detailed",
    }


def assert_same(have: dict[str, Any], want: dict[str, Any], requests: list[Any] = REQUESTS) -> None:
    for n, one in enumerate(requests):
        assert have["tokens"][n] == want["tokens"][n], one
        assert have["ends"][n] == want["ends"][n], one
        assert bool(want["logprobs"][n]) == ("logprobs" in one[1])
        assert_logprobs(have["logprobs"][n], want["logprobs"][n], str(one))
        # Near max_model_len there are fewer drafts, as the scheduler runs ahead of the tokens.
        if len(one[0]) + one[1]["max_tokens"] < OPTIONS["max_model_len"]:
            assert have["drafts"][n] == want["drafts"][n], one


def check(
    want: dict[str, Any], fused: EngineChild, models: dict[str, str], method: str, *windows: Any
) -> None:
    """``windows``: decode steps, and a seed if they end after a random number of rounds."""
    options = with_drafts(models, method)
    for decode_steps, cut_seed in windows:
        args = (target_of(models, method), options, REQUESTS, decode_steps, cut_seed)
        have = fused.call(speculation_child.run, *args)
        assert_same(have, want)
        assert_in_windows(have["counts"])


def assert_in_windows(counts: dict[str, Any]) -> None:
    assert counts["steps"] > 1.2 * counts["windows"] > 0, counts
    assert set(counts["stock_steps"]) <= {"prefill", "fewer drafts than configured"}


@pytest.mark.parametrize("method", METHODS)
def test_equal_to_stock(wanted: Any, fused: EngineChild, models: Any, method: str) -> None:
    check(wanted(method), fused, models, method, (64, 5))


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_equal_to_stock_for_every_length(
    wanted: Any, fused: EngineChild, models: Any, method: str
) -> None:
    lengths = (8, 16, 64, "auto")
    check(wanted(method), fused, models, method, *((k, None) for k in lengths), (64, 1), (20, 2))


def check_on_the_stand_in(
    want: Any, stand_in: StandInChild, models: Any, method: str, mode: str, *windows: Any
) -> None:
    """``windows``: a seed if the device works at random times, None as late as it may; then as in
    ``check``."""
    settings = GRAPHS | {"cudagraph_mode": mode, "max_logits_bytes": 0}
    stand_in.become(settings, target_of(models, method), **with_drafts(models, method))
    waits: set[str] = set()
    for seed, *window in windows:
        have = stand_in.call(speculation_child.answer_on_the_stand_in, seed, REQUESTS, *window)
        assert_same(have, want)
        assert_in_windows(have["counts"])
        waits |= set(have["waits"])  # none where a window has two rounds
        is_full = mode.startswith("FULL")
        graphs = have["graphs"]
        has_draft_model = METHODS.get(method, {}).get("model") == "draft"
        # vLLM's graph, and our own of what vLLM itself launches call by call.
        assert graphs["windows"] == 0 and bool(graphs["full"]) == is_full
        assert bool(graphs["drafts"]) == (is_full and has_draft_model)
    assert waits == {"an event"}, "of the pace; nothing else is waited for"


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        ("draft_model", "FULL_AND_PIECEWISE"),
        ("eagle3", "FULL_AND_PIECEWISE"),
        ("mtp", "FULL_AND_PIECEWISE"),
        ("ngram", "PIECEWISE"),
        ("ngram_gpu", "NONE"),
    ],
)
def test_on_the_stand_in(
    wanted: Any, stand_in: StandInChild, models: Any, method: str, mode: str
) -> None:
    """A GPU's memory and streams."""
    want = wanted(method.removesuffix("_gpu"))
    check_on_the_stand_in(want, stand_in, models, method, mode, (None, 64, None), (3, 64, 5))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL", "PIECEWISE", "NONE"])
@pytest.mark.parametrize("method", [*METHODS, "ngram_gpu"])
def test_on_the_stand_in_in_every_mode(
    wanted: Any, stand_in: StandInChild, models: Any, method: str, mode: str
) -> None:
    want = wanted(method.removesuffix("_gpu"))
    windows = [(seed, k, None) for seed, k in ((None, 8), (1, 16), (2, "auto"))]
    check_on_the_stand_in(want, stand_in, models, method, mode, *windows, (4, 64, 1), (None, 20, 2))


@pytest.mark.parametrize(
    ("method", "loop", "seed"),
    [("draft_model", "auto", None), ("drawn", "replay", 1), ("ngram", "auto", 2)],
)
def test_whole_rounds_as_graphs(
    stock: EngineChild, stand_in: StandInChild, models: Any, method: str, loop: str, seed: int
) -> None:
    check_whole_rounds(stock, stand_in, models, method, loop, seed)


@pytest.mark.parametrize(
    ("method", "loop", "seed"),
    [
        ("eagle", "replay", None),
        ("eagle3", "auto", 1),
        pytest.param("mtp", "auto", 3, marks=pytest.mark.exhaustive),
        pytest.param("one", "auto", 2, marks=pytest.mark.exhaustive),
    ],
)
def test_heads_in_whole_rounds(
    stock: EngineChild, stand_in: StandInChild, models: Any, method: str, loop: str, seed: int
) -> None:
    check_whole_rounds(stock, stand_in, models, method, loop, seed)


def check_whole_rounds(
    stock: EngineChild, stand_in: StandInChild, models: Any, method: str, loop: str, seed: int
) -> None:
    """Target, verification and drafter: a graph for each round, or for each window."""
    options = with_drafts(models, method)
    target = target_of(models, method)
    want = stock.call(speculation_child.run, target, options, PLAIN)
    stand_in.become(GRAPHS, target, **options, loop=loop)
    for window in ((64, None), ("auto", 3)):
        have = stand_in.call(speculation_child.answer_on_the_stand_in, seed, PLAIN, *window)
        assert_same(have, want, PLAIN)
        counts, graphs = have["counts"], have["graphs"]
        assert counts["steps"] > 1.2 * counts["windows"] > 0
        # One launch a window; or one a round, and up to two after its last.
        most = counts["windows"] if loop == "auto" else counts["steps"] + 2 * counts["windows"]
        assert 0 < graphs["windows"] <= most
        # Nothing else, but for a step of vLLM's own between two windows.
        assert graphs["drafts"] == 0 and graphs["full"] <= sum(counts["stock_steps"].values())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Requests with adapters of the target and without, that come and go."""
    root = tmp_path_factory.mktemp("lora")
    folders = [tiny_models.make_adapter(n, root / f"adapter-{n}") for n in (1, 2)]
    return [
        asked(0, lora=folders[0]),
        asked(0, lora=folders[1], logprobs=1),
        asked(0, max_tokens=25),
        asked(2, at=5, lora=folders[0], temperature=0.8, seed=1, max_tokens=40),
        asked(1, at=9, lora=folders[1], temperature=0.7, seed=2, top_k=5),
        asked(4, at=12, stop_token_ids=[11, 12]),
    ]


LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}


@pytest.mark.parametrize(
    "method", ["draft_model", pytest.param("eagle3", marks=pytest.mark.exhaustive)]
)
def test_adapters_of_the_target(
    stock: EngineChild, fused: EngineChild, models: Any, mixed: list[Any], method: str
) -> None:
    args = models["target"], with_drafts(models, method) | LORA
    run = speculation_child.run_with_adapters
    want = stock.call(run, *args, mixed)
    assert want["tokens"][0] != want["tokens"][1] != want["tokens"][2] != want["tokens"][0]
    for window in ((64, 5), ("auto", None)):
        have = fused.call(run, *args, mixed, *window)
        assert_same(have, want, mixed)
        assert_in_windows(have["counts"])


def test_rounds_without_their_adapters_show(
    stock: EngineChild, fused: EngineChild, models: Any, mixed: list[Any]
) -> None:
    """The control."""
    args = models["target"], with_drafts(models, "draft_model") | LORA
    run = speculation_child.run_with_adapters
    want = stock.call(run, *args, mixed[:3])
    have = fused.call(run, *args, mixed[:3], 64, without=True)
    assert have["tokens"][:2] != want["tokens"][:2]


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_recorded_rounds_are_proved(
    stand_in: StandInChild, models: dict[str, str], method: str
) -> None:
    """Made-up requests, before rounds serve: what is not the tokens of launched ones is found."""
    stand_in.become(GRAPHS, models["target"], **with_drafts(models, method))
    assert stand_in.call(speculation_child.prove, None) is None
    assert "not those of the eager loop" in stand_in.call(speculation_child.prove, "nothing")


def test_wrong_drafts(stock: EngineChild, fused: EngineChild, models: dict[str, str]) -> None:
    """A drafter that errs costs time, not tokens: greedy ones are those without drafts."""
    want = stock.call(speculation_child.run, models["target"], OPTIONS, REQUESTS)
    options = with_drafts(models, "draft_model") | {"seed": 1}  # an engine of its own
    have = fused.call(
        speculation_child.run_with_wrong_drafts, models["target"], options, REQUESTS, 64
    )
    for n in GREEDY:
        assert have["tokens"][n] == want["tokens"][n], REQUESTS[n]


def test_a_round_that_forgets(
    stock: EngineChild, fused: EngineChild, models: dict[str, str]
) -> None:
    """The control: each round of a window must go on from what the one before took."""
    want = stock.call(speculation_child.run, models["target"], OPTIONS, REQUESTS[:3])
    have = fused.call(
        speculation_child.run_without_the_device_s_lengths,
        models["target"],
        with_drafts(models, "ngram"),
        REQUESTS[:3],
        64,
    )
    assert have["tokens"][0] != want["tokens"][0]
