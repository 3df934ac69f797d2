"""vLLM's engine on the stand-in GPU: its CUDA start, then the CPU engine's tokens in every form.

Real vLLM, its scheduler and Model Runner V2; our runner takes its branches for CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import engine_child
import pytest
import standin_child
import standin_faults
from standin.mixture import ABORT, ARRIVE, MOST_STEPS, OPTIONS, REQUESTS, THREE, assert_same
from standin_child import StandInChild

LATE = None  # the device works as late as the program allows; else at random times, of this seed
# Graphs for prefills, too; one of them has more rows than there can be, which are no size of these.
MANY = {"cudagraph_mode": "FULL", "capture_sizes": (*range(1, 19), 24)}
# Bytes that vLLM's accounting may not see: a window's rows, two results of 64 steps, copies of what
# the host writes of a request. Nothing as wide as the vocabulary: float32 of it is as much again.
UNSEEN = OPTIONS["max_num_seqs"] * 4096


@pytest.fixture(scope="module")
def engine(tiny_model: str) -> Iterator[StandInChild]:
    child = StandInChild(tiny_model, {}, **OPTIONS)
    yield child
    child.close()


def run(
    engine: StandInChild,
    decode_steps: object,
    seed: int | None,
    what: tuple[Any, ...] = (REQUESTS, ARRIVE, ABORT, MOST_STEPS),
) -> tuple[Any, Any]:
    """The results of the mixture, or of ``what``, and the worker's counts since."""
    engine.call(standin_child.use_timing, seed)
    engine.call(engine_child.set_decode_steps, decode_steps)
    engine.call(engine_child.reset_prefix_cache)
    before, replays = engine.call(engine_child.window_stats), engine.call(standin_child.num_replays)
    got = engine.call(engine_child.run, *what)
    stats = engine.call(engine_child.window_stats)
    for name in ("windows", "steps", "tokens"):
        stats[name] -= before[name]
    after = engine.call(standin_child.num_replays)
    return got, stats | {"replays": {name: after[name] - n for name, n in replays.items()}}


def test_start(engine: StandInChild) -> None:
    """The first engine of its process. Its graphs take no more memory than was kept for them."""
    engine.become({}, **OPTIONS)
    stats, state = engine.call(engine_child.window_stats), engine.call(standin_child.device_state)
    assert (stats["loop"], stats["loop_reason"]) == ("while", "works here")
    assert state["unfinished"] == 0
    assert 0 < state["captured"] <= state["estimated"]
    assert 0 < state["unseen"] <= UNSEEN


@pytest.mark.parametrize(
    ("form", "decode_steps", "seed"),
    [
        ("while", 64, LATE),
        ("while", 7, 1),
        ("unrolled", "auto", LATE),
        ("replay", 7, 2),
        ("eager", 2, LATE),
    ],
)
def test_tokens(
    engine: StandInChild, expected: dict[str, Any], form: str, decode_steps: object, seed: int
) -> None:
    engine.become({}, **OPTIONS)
    assert engine.call(standin_child.use_loop, form)["loop"] == form
    got, stats = run(engine, decode_steps, seed)
    assert_same(got, expected)
    assert stats["steps"] > 1.5 * stats["windows"] > 0
    assert set(stats["stock_steps"]) == {"prefill"}
    assert stats["replays"]["pieces"] > 0, "prefills take vLLM's piecewise graphs"
    assert got["preemptions"] and sum(got["cached_tokens"])
    assert 0 < engine.call(standin_child.device_state)["unseen"] <= UNSEEN


@pytest.mark.parametrize(
    ("settings", "rows", "form"),
    [(MANY, 19, "while"), ({"cudagraph_mode": "NONE"}, 3, "eager")],
    ids=["many sizes", "no graphs"],
)
def test_start_and_tokens(
    engine: StandInChild,
    expected: dict[str, Any],
    settings: dict[str, Any],
    rows: int,
    form: str,
) -> None:
    engine.become(settings, **OPTIONS | {"max_num_seqs": rows})
    got, stats = run(engine, 7, 3)
    assert (stats["loop"], stats["steps"] > stats["windows"] > 0) == (form, True)
    assert_same(got, expected)


@pytest.mark.parametrize(
    ("mode", "form", "kind", "graphs"),
    [
        ("FULL_AND_PIECEWISE", "while", "pieces", 3),
        ("FULL", "while", "full", 1),
        ("PIECEWISE", "eager", "pieces", 3),
    ],
)
def test_batches_of_no_capture_size(
    engine: StandInChild,
    expected_of_three: list[dict[str, Any]],
    mode: str,
    form: str,
    kind: str,
    graphs: int,
) -> None:
    """Three rows, between the sizes 2 and 8: vLLM's steps have graphs of this ``kind``, so many for
    a forward. A window's steps are recorded, or have vLLM's (here for their logprobs)."""
    engine.become({"cudagraph_mode": mode, "capture_sizes": (1, 2, 8, 32)}, **OPTIONS)
    for requests, wanted in zip(THREE, expected_of_three, strict=True):
        logprobs = requests[0][1]["logprobs"]
        got, stats = run(engine, 7, LATE, (requests,))
        assert_same(got, wanted)
        assert (stats["loop"], set(stats["stock_steps"])) == (form, {"prefill"})
        recorded = logprobs is None and form != "eager"
        forwards = 1 if recorded else 1 + stats["steps"]  # the prefill's, too
        replays = {"full": 0, "pieces": 0, "windows": recorded * stats["windows"], "drafts": 0}
        assert stats["steps"] == 19 and stats["windows"] == 3
        assert stats["replays"] == replays | {kind: graphs * forwards}


def test_stale_parameters_are_seen(engine: StandInChild, expected: dict[str, Any]) -> None:
    """The control, and the engine's last test."""
    engine.call(standin_faults.keep_stale_parameters)
    with pytest.raises(AssertionError):  # or vLLM's: of a token that nobody waits for
        assert_same(run(engine, 7, LATE)[0], expected)
