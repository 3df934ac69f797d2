"""A workload that is hard on windows, run in a ``features_child.FeatureChild``.

Random prompts that arrive late and end at different times; windows cut after a random number of
steps; then prompts that continue the answers, which hit blocks that windows wrote. Stock vLLM and
fusedstep answer the same requests: their tokens must be equal, however the batches were formed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import engine_child
import features_child
from tiny_models import FIRST_WORD, LAST_WORD


@dataclass(frozen=True)
class Workload:
    """What is asked. The same workload gives the same requests in every process."""

    seed: int = 0
    num_requests: int = 10
    prompt_len: tuple[int, int] = (3, 90)
    max_tokens: tuple[int, int] = (2, 120)
    arrives_by: int = 40  # engine step; each request comes before a random one up to it
    serial: bool = False  # each request comes when the one before has ended
    phases: int = 2  # the prompts of a later one continue the answers of the one before
    temperature: float = 0.0  # above 0 each request has a seed
    decode_steps: object = "auto"
    cut_seed: int | None = None  # windows end after a random number of steps
    max_prompt_len: int = 400  # longer ones are left out of later phases
    media: str = "image"  # or audio, video
    image_share: float = 0.0  # of the requests: that have media
    image_tokens: tuple[int, ...] = ()  # where it stands in a prompt
    loras: tuple[str | None, ...] = (None,)  # folders of adapters, taken in turn
    logprobs: int | None = None  # of each token, so many: in ``completions``
    experts_from: tuple[int, ...] = (0,)  # tokens of a prompt whose experts nobody wants, in turn


@dataclass(frozen=True)
class Request:
    token_ids: list[int]
    max_tokens: int
    arrives: int
    image: int | None = None  # seed of its pixels, or its sound
    media: str = "image"


def run(model: str, options: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """Per phase: tokens and their experts, completions as ``bench.verify`` compares them, cached
    tokens, preemptions; the counts of windows.

    ``options`` are of the LLM, as for ``features_child.use``.
    """
    features_child.use(model, options)
    return answer(workload)


def answer(workload: Workload) -> dict[str, Any]:
    """As ``run``, of the engine that is there."""
    engine_child.reset_prefix_cache()
    fused = bool(features_child.counts())
    if fused:
        engine_child.set_decode_steps(workload.decode_steps)
    before = features_child.counts()
    rng = random.Random(workload.seed)
    requests = first_requests(workload, rng)
    phases = []
    with _cut_windows(workload.cut_seed if fused else None):
        for phase in range(workload.phases):
            answers = _answer(workload, phase, requests)
            phases.append(answers)
            requests = _continue(workload, rng, requests, answers["tokens"])
    return {"phases": phases, "counts": features_child.since(before)}


def first_requests(workload: Workload, rng: random.Random) -> list[Request]:
    requests = []
    for number in range(workload.num_requests):
        token_ids = [
            rng.randint(FIRST_WORD, LAST_WORD) for _ in range(rng.randint(*workload.prompt_len))
        ]
        image = None
        if rng.random() < workload.image_share:
            image = number
            token_ids[3:3] = workload.image_tokens
        requests.append(
            Request(
                token_ids,
                rng.randint(*workload.max_tokens),
                rng.randint(0, workload.arrives_by),
                image,
                workload.media,
            )
        )
    return requests


def _continue(
    workload: Workload, rng: random.Random, requests: list[Request], answers: list[list[int]]
) -> list[Request]:
    """Each prompt, its answer, and some words more."""
    longer = []
    for request, answer in zip(requests, answers, strict=True):
        more = [rng.randint(FIRST_WORD, LAST_WORD) for _ in range(rng.randint(1, 20))]
        token_ids = [*request.token_ids, *answer, *more]
        max_tokens = rng.randint(2, workload.max_tokens[1] // 2)
        arrives = rng.randint(0, workload.arrives_by // 2)
        if len(token_ids) <= workload.max_prompt_len:
            longer.append(
                replace(request, token_ids=token_ids, max_tokens=max_tokens, arrives=arrives)
            )
    return longer


def _answer(workload: Workload, phase: int, requests: list[Request]) -> dict[str, Any]:
    engine = engine_child.ENGINE
    outputs: dict[int, Any] = {}
    preemptions: dict[str, int] = {}
    waiting = dict(enumerate(requests))
    step = 0
    while waiting or engine.has_unfinished_requests():
        for number in _due(workload, waiting, step, engine):
            request = waiting.pop(number)
            engine.add_request(
                f"{phase}-{number}",
                prompt_of(request),
                features_child.sampling_params(fields_of(workload, number, request)),
                lora_request=features_child.lora_request(
                    workload.loras[number % len(workload.loras)]
                ),
            )
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id.split("-")[1])] = output
        scheduler = engine_child.scheduler()
        for each in [*scheduler.running, *scheduler.waiting]:
            preemptions[each.request_id] = each.num_preemptions
        step += 1
        assert step < 20000, (sorted(waiting), sorted(outputs))
    ordered = [outputs[number] for number in range(len(requests))]
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in ordered],
        "experts": [output.outputs[0].routed_experts for output in ordered],  # or None
        "completions": [_completions(output) for output in ordered],
        "cached": [output.num_cached_tokens for output in ordered],
        "preemptions": sum(preemptions.values()),
    }


def _completions(output: Any) -> dict[str, Any]:
    return {"prompt": "", "completions": [engine_child.completion(output.outputs[0])]}


def _due(workload: Workload, waiting: dict[int, Request], step: int, engine: Any) -> list[int]:
    if workload.serial:
        return [] if engine.has_unfinished_requests() else [min(waiting)]
    return [number for number, request in waiting.items() if request.arrives <= step]


def prompt_of(request: Request) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": request.token_ids}
    if request.image is not None:
        prompt["multi_modal_data"] = {request.media: MEDIA[request.media](request.image)}
    return prompt


def _image(seed: int) -> Any:
    """Random pixels; the size is random, too."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    width, height = (int(side) * 32 for side in rng.integers(2, 5, 2))
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def _audio(seed: int) -> Any:
    """Half a second to two seconds of noise, and its rate."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return rng.standard_normal(int(rng.integers(8000, 32000)), dtype=np.float32), 16000


def _video(seed: int) -> Any:
    """Frames of random pixels, and what a reader of files would tell of them."""
    import numpy as np

    rng = np.random.default_rng(seed)
    width, height = (int(side) * 32 for side in rng.integers(2, 5, 2))
    num_frames = 2 * int(rng.integers(1, 4))
    frames = rng.integers(0, 255, (num_frames, height, width, 3), dtype=np.uint8)
    return frames, {
        "fps": 2.0,
        "duration": num_frames / 2,
        "total_num_frames": num_frames,
        "frames_indices": list(range(num_frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


MEDIA: dict[str, Callable[[int], Any]] = {"image": _image, "audio": _audio, "video": _video}


def fields_of(workload: Workload, number: int, request: Request) -> dict[str, Any]:
    fields: dict[str, Any] = {"max_tokens": request.max_tokens, "ignore_eos": True}
    if workload.temperature:
        fields |= {"temperature": workload.temperature, "seed": 7 + number}
    if workload.logprobs is not None:
        fields["logprobs"] = workload.logprobs
    if workload.experts_from != (0,):
        starts = workload.experts_from
        fields["routed_experts_prompt_start"] = starts[number % len(starts)]
    return fields


@contextmanager
def _cut_windows(seed: int | None) -> Iterator[None]:
    """The runner is told to end each window after 0 to 11 more steps."""
    if seed is None:
        yield
        return
    rng = random.Random(seed)

    def cut_short(runner: Any, arrivals_seen: int) -> Callable[[], bool]:
        left = iter([False] * rng.randrange(12))
        return lambda: next(left, True)

    with patch.object(type(engine_child.runner()), "_cut_short", cut_short):
        yield
