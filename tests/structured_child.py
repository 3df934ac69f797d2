"""Inside a child process of ``features_child``: requests with structured output, and faults."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any
from unittest.mock import patch

import engine_child
import features_child
import standin_child

Asked = tuple[str, dict[str, Any], int]  # prompt, sampling fields, engine step of its arrival


def run(
    model: str, options: dict[str, Any], requests: list[Asked], decode_steps: object = 1
) -> dict[str, Any]:
    """``engine_child.run``, with the worker's counts and the scheduler's one-step turns."""
    features_child.use(model, options)
    return answer(requests, decode_steps)


def run_on_the_stand_in(
    form: str, seed: int | None, requests: list[Asked], decode_steps: object
) -> dict[str, Any]:
    """The same of the child's engine, in this form of the loop; ``replays`` of its graphs."""
    loop = standin_child.use_loop(form)["loop"]
    standin_child.use_timing(seed)
    before = standin_child.num_replays()["windows"]
    result = answer(requests, decode_steps)
    return result | {"loop": loop, "replays": standin_child.num_replays()["windows"] - before}


def answer_without_tables(requests: list[Asked]) -> dict[str, Any]:
    """What a new grammar needs does not come to the device."""
    from fusedstep.vllm_plugin.runner.grammars import Grammars

    with patch.object(Grammars, "take", lambda *_: None):
        return answer(requests, 7)


def run_with_one_mask(model: str, options: dict[str, Any], requests: list[Asked]) -> Any:
    """Rounds whose drafts do not move their grammars on."""
    from fusedstep.vllm_plugin.runner.grammars import DeviceMasks

    constrain = DeviceMasks.constrain_drafts

    def fixed(self: Any, *args: Any) -> Any:
        with patch.object(DeviceMasks, "_follow_one", lambda *_: None):
            return constrain(self, *args)

    with patch.object(DeviceMasks, "constrain_drafts", fixed):
        return run(model, options, requests, 64)


def answer(requests: list[Asked], decode_steps: object) -> dict[str, Any]:
    """Grammars have the time that a machine with other tests on it needs."""
    from fusedstep.vllm_plugin.scheduler import grammars

    engine_child.reset_prefix_cache()
    before, turns, refused = features_child.counts(), Counter(one_step_turns()), num_refused()
    if before:
        engine_child.set_decode_steps(decode_steps)
    pairs = [(prompt, fields) for prompt, fields, _ in requests]
    arrive = {n: at for n, (_, _, at) in enumerate(requests)}
    with patch.object(grammars, "Limits", partial(grammars.Limits, seconds=60)):
        result = engine_child.run(pairs, arrive)
    return result | {
        "counts": features_child.since(before),
        "turns": dict(Counter(one_step_turns()) - turns),
        "refused": num_refused() - refused,
    }


def one_step_turns() -> dict[str, int]:
    """By reason; none in stock's process."""
    counts = getattr(engine_child.scheduler(), "counts", None)
    return {} if counts is None else {str(k): n for k, n in counts.one_step_turns.items()}


def num_refused() -> int:
    counts = getattr(engine_child.scheduler(), "counts", None)
    return 0 if counts is None else counts.refused_tokens


def run_with_few_states(
    model: str, options: dict[str, Any], requests: list[Asked], decode_steps: object, states: int
) -> dict[str, Any]:
    """Every automaton ends after its first states."""
    from dataclasses import replace

    from fusedstep.vllm_plugin.scheduler import grammars

    build = grammars.build

    def few(compiled: Any, stop_token_ids: Any, vocabulary: Any, limits: Any) -> Any:
        return build(compiled, stop_token_ids, vocabulary, replace(limits, states=states))

    with patch.object(grammars, "build", few):
        options = options | {"seed": states}  # an engine of its own
        return run(model, options, requests, decode_steps)


def run_with_full_tables(
    model: str, options: dict[str, Any], requests: list[Asked], decode_steps: object, states: int
) -> dict[str, Any]:
    """The tables hold only so many states; ``evicted``: grammars that made way for others."""
    from fusedstep.vllm_plugin import grammar_tables
    from fusedstep.vllm_plugin.scheduler.grammars import Grammars

    evicted = 0
    place = Grammars._place

    def placed(self: Grammars, *args: Any) -> Any:
        nonlocal evicted
        before = set(self.shares)
        with patch.object(grammar_tables, "MAX_STATES", states):
            share = place(self, *args)
        evicted += len(before - set(self.shares))
        return share

    with patch.object(Grammars, "_place", placed):
        result = run(model, options | {"seed": 2}, requests, decode_steps)  # an engine of its own
    return result | {"evicted": evicted}


def run_without_masks(
    model: str, options: dict[str, Any], requests: list[Asked], decode_steps: object
) -> dict[str, Any]:
    """The device lets every token through."""
    from fusedstep.ops import native_grammar

    with patch.object(native_grammar, "constrain_rows", mask_nothing):
        return run(model, options, requests, decode_steps)


def mask_nothing(*args: Any) -> None:
    """In the place of ``constrain_rows``."""
    *_, num_reqs, rows, _ = args
    rows.sampled[:num_reqs] = -1
