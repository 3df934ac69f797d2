"""Models that take images, M-RoPE and prompt embeddings in windows: stock's tokens.

Stock Model Runner V2 is the oracle (``FUSEDSTEP=oracle``): it answers the same requests, with
images and without, that come late, end at different times, are preempted and hit prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import engine_child
import features_child
import multimodal_child
import pytest
import standin_child
import tiny_vlms
import workload_child
from engine_child import EngineChild
from features_child import FeatureChild
from standin_child import StandInChild
from workload_child import Workload

OPTIONS: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 24,
    "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",  # from the start: not all kernels have a native stand-in
}
# KV blocks: so few that requests are preempted, enough for one of max_model_len in each group.
NUM_BLOCKS = {"qwen25_vl": 18, "qwen3_vl": 18, "gemma3": 40, "gemma4": 34}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("vlms")

    def path(name: str) -> str:
        made = folder / name
        return str(made) if made.exists() else tiny_vlms.make(name, made)

    return path


def _child(switch: str) -> EngineChild:
    """One thread: the models are so small that threads would wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        child = FeatureChild(switch)
        child.call(features_child.ready)
    return child


@pytest.fixture(scope="module")
def oracle() -> Iterator[EngineChild]:
    child = _child("oracle")
    yield child
    child.close()


@pytest.fixture(scope="module")
def fused() -> Iterator[EngineChild]:
    child = _child("on")
    yield child
    child.close()


@pytest.fixture(scope="module")
def expected(oracle: EngineChild, models: Callable[[str], str]) -> Callable[..., Any]:
    """The oracle's answers to a workload: they do not depend on windows. Asked for once."""
    answers: dict[Any, Any] = {}

    def ask(name: str, workload: Workload) -> Any:
        if (name, workload) not in answers:
            result = oracle.call(workload_child.run, models(name), options(name), workload)
            answers[name, workload] = result
        return answers[name, workload]

    return ask


def options(name: str) -> dict[str, Any]:
    return OPTIONS | {"num_gpu_blocks_override": NUM_BLOCKS[name]}


def _workload(name: str, **fields: Any) -> Workload:
    return Workload(
        image_share=0.7,
        image_tokens=tiny_vlms.IMAGE_TOKENS[name],
        arrives_by=8,
        **fields,
    )


def _tokens(result: dict[str, Any]) -> list[Any]:
    return [phase["tokens"] for phase in result["phases"]]


def _assert_equal(have: dict[str, Any], want: dict[str, Any]) -> None:
    assert _tokens(have) == _tokens(want)
    counts = have["counts"]
    assert counts["steps"] > counts["windows"] > 0, counts
    assert set(counts["stock_steps"]) == {"prefill"}, counts


# Each model once; all K with the one that has both M-RoPE and images.
RUNS = [
    ("qwen25_vl", "auto", None, 0.0),
    ("qwen25_vl", 7, 1, 0.0),
    ("qwen25_vl", 2, None, 0.8),
    ("qwen25_vl", "auto", 3, 0.8),
    ("qwen3_vl", "auto", 2, 0.8),
    ("gemma3", "auto", 4, 0.0),
    ("gemma4", "auto", 5, 0.0),
]


@pytest.mark.parametrize(("name", "decode_steps", "cut_seed", "temperature"), RUNS)
def test_images_and_text(
    fused: EngineChild,
    models: Callable[[str], str],
    expected: Callable[..., Any],
    name: str,
    decode_steps: Any,
    cut_seed: int | None,
    temperature: float,
) -> None:
    plain = _workload(name, temperature=temperature)
    want = expected(name, plain)
    workload = _workload(
        name, temperature=temperature, decode_steps=decode_steps, cut_seed=cut_seed
    )
    have = fused.call(workload_child.run, models(name), options(name), workload)
    _assert_equal(have, want)
    assert sum(phase["preemptions"] for phase in have["phases"]) > 0
    if name != "gemma3":  # whose blocks are gone when its prompts come again
        assert sum(have["phases"][1]["cached"]) > 0


@pytest.mark.parametrize(
    ("name", "what"), [("qwen25_vl", "delta"), ("qwen25_vl", "embeds"), ("gemma4", "side effects")]
)
def test_nothing_can_be_left_out(
    fused: EngineChild,
    models: Callable[[str], str],
    expected: Callable[..., Any],
    name: str,
    what: str,
) -> None:
    """The control: without it tokens differ, so the workload would show it."""
    workload = _workload(name)
    have = fused.call(multimodal_child.run_without, what, models(name), options(name), workload)
    assert have["counts"]["windows"] > 0
    assert _tokens(have)[0] != _tokens(expected(name, workload))[0]


SHORT = Workload(
    num_requests=8,
    prompt_len=(3, 60),
    max_tokens=(2, 30),
    arrives_by=8,
    image_share=0.7,
    image_tokens=tiny_vlms.IMAGE_TOKENS["qwen25_vl"],
    temperature=0.8,
)
STANDIN: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "kv_cache_memory_bytes": 7 * 2 * 2 * 32 * 32 * 4,  # seven blocks of two layers in float32
    "limit_mm_per_prompt": OPTIONS["limit_mm_per_prompt"],
}


@pytest.fixture(scope="module")
def standin(models: Callable[[str], str]) -> Iterator[StandInChild]:
    child = StandInChild(models("qwen25_vl"), {}, **STANDIN)
    yield child
    child.close()


@pytest.mark.parametrize("form", ["while", "unrolled", "replay", "eager"])
def test_recorded_windows(
    standin: StandInChild,
    oracle: EngineChild,
    models: Callable[[str], str],
    form: str,
) -> None:
    """The stand-in GPU runs the vision tower, too; nothing in a window waits for the device."""
    want = oracle.call(multimodal_child.answers, models("qwen25_vl"), STANDIN, SHORT)
    assert standin.call(standin_child.use_loop, form)["loop"] == form
    standin.call(engine_child.reset_prefix_cache)
    have = standin.call(engine_child.run, *multimodal_child.requests_of(SHORT))
    assert multimodal_child.tokens(have) == want
    stats = standin.call(engine_child.window_stats)
    assert stats["steps"] > stats["windows"] > 0, stats
    assert set(stats["stock_steps"]) == {"prefill"}


def test_recorded_windows_need_the_delta_of_now(
    standin: StandInChild, oracle: EngineChild, models: Callable[[str], str]
) -> None:
    """The control: the device's copy of the deltas, never refreshed."""
    want = oracle.call(multimodal_child.answers, models("qwen25_vl"), STANDIN, SHORT)
    standin.call(multimodal_child.keep_old_deltas)
    have = standin.call(engine_child.run, *multimodal_child.requests_of(SHORT))
    assert multimodal_child.tokens(have) != want
