"""Inside a ``features_child.FeatureChild``: workloads with the inputs of decode steps left out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import engine_child
import features_child
import workload_child
from workload_child import Workload


def run_workload(
    model: str, options: dict[str, Any], workload: Workload, without: str | None
) -> dict[str, Any]:
    """The workload; with a fault in the windows if ``without`` names what their steps leave out."""
    features_child.use(model, options)
    with _fault(without):
        return workload_child.run(model, options, workload)


@contextmanager
def _without_delta(inputs: Any) -> Iterator[None]:
    """Every row is at the position that a text of its length would have."""
    with patch.object(inputs, "prefill_delta", inputs.prefill_delta.new_zeros(64)):
        yield


@contextmanager
def _without_embeds(inputs: Any) -> Iterator[None]:
    """The model gets what a prefill left in the buffer."""
    with _embedder(inputs, lambda *_: None):
        yield


@contextmanager
def _without_side_effects(inputs: Any) -> Iterator[None]:
    """The language model's embeddings, without what the whole model keeps beside them."""
    language_model = inputs.model.get_language_model()

    def embed(input_ids: Any, *_: Any) -> None:
        inputs.embeds[: len(input_ids)] = language_model.model.embed_input_ids(input_ids)

    with _embedder(inputs, embed):
        yield


def _embedder(inputs: Any, embed: Any) -> Any:
    """Windows embed with this; prefills as ever."""
    return patch.object(inputs, "encoder_runner", SimpleNamespace(get_inputs_embeds=embed))


@contextmanager
def _without_writes(inputs: Any) -> Iterator[None]:
    with patch.object(inputs, "write", lambda num_rows: None):
        yield


@contextmanager
def _without_encoder_lengths(inputs: Any) -> Iterator[None]:
    """Rows attend to the first of the encoder's keys alone."""
    lengths = engine_child.runner().decode_model.encoder_lengths

    def stage(rows: Any) -> None:
        lengths.lengths[: len(rows)] = 1

    with patch.object(lengths, "stage", stage):
        yield


FAULTS = {
    "encoder lengths": _without_encoder_lengths,
    "writes": _without_writes,
    "delta": _without_delta,
    "embeds": _without_embeds,
    "side effects": _without_side_effects,
}


def _fault(without: str | None) -> Any:
    if without is None:
        return nullcontext()
    return FAULTS[without](engine_child.runner().decode_model.model_inputs)


def ask(
    model: str, options: dict[str, Any], requests: Any, arrive: Any, without: str | None = None
) -> dict[str, Any]:
    """``engine_child.run``, and the counts of windows."""
    features_child.use(model, options)
    before = features_child.counts()
    with _fault(without):
        result = engine_child.run(requests, arrive)
    return result | {"counts": features_child.since(before)}


def answers(model: str, options: dict[str, Any], workload: Workload) -> list[list[int]]:
    """Tokens of the first phase of a workload, asked as ``requests_of`` gives it."""
    features_child.use(model, options)
    return tokens(engine_child.run(*requests_of(workload)))


def requests_of(workload: Workload) -> tuple[list[tuple[Any, dict[str, Any]]], dict[int, int]]:
    """For ``engine_child.run``: prompts with their fields, and when they arrive."""
    requests = workload_child.first_requests(workload, random.Random(workload.seed))
    return (
        [
            (workload_child.prompt_of(request), workload_child.fields_of(workload, number, request))
            for number, request in enumerate(requests)
        ],
        {number: request.arrives for number, request in enumerate(requests)},
    )


def tokens(result: dict[str, Any]) -> list[list[int]]:
    return [completion["token_ids"] for (completion,) in result["completions"]]


def keep_old_deltas() -> None:
    """The windows' copy of M-RoPE's deltas is left as it is, for the rest of this process."""
    tables = engine_child.runner().tables
    static = tables.static
    index = next(i for i, (copy, _) in enumerate(static._copies) if copy is tables.prefill_delta)
    del static._copies[index], static._seen[index]


def prompt_token_ids(model: str, options: dict[str, Any], prompts: list[Any]) -> list[list[int]]:
    """vLLM's tokens of ``bench.images.ImagePrompt``s."""
    llm = features_child.use(model, options)
    params = features_child.sampling_params({"max_tokens": 1})
    outputs = llm.generate([p.for_model(llm) for p in prompts], params, use_tqdm=False)
    return [list(output.prompt_token_ids) for output in outputs]
