"""Recorded windows: every form gives the tokens of the eager loop, and asks the device nothing."""

from importlib.util import find_spec
from itertools import chain

import numpy as np
import pytest
import torch
from window.engine import FORMS, MAX_TOKENS, ROWS, VOCAB, emitted, recorded
from window.tape import SyncTrap, TapeRecorder

from fusedstep.ops.types import BatchNeeds
from fusedstep.window.graphs import UNROLLED_STEPS, VARIANTS, variant
from fusedstep.window.loop import run_window
from fusedstep.window.pace import AheadPace, HostPace
from fusedstep.window.state import Fetched

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="there is no Triton for this platform"
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_steps", [1, 11])
def test_tokens_are_those_of_the_eager_loop(engine, recorder, form, num_steps):
    """A window of 11 is an unrolled graph and 3 single steps."""
    graphs = recorded(form, engine, recorder)
    for _ in range(-(-max(MAX_TOKENS) // num_steps)):
        engine.window([num_steps] * ROWS, graphs=graphs, logprobs=False)
    assert engine.outputs == emitted()
    assert engine.model.begun == engine.model.forwards == 0  # nothing ran eagerly


@pytest.mark.parametrize("form", FORMS)
def test_recording_touches_no_request(engine, recorder, form):
    """After windows of others: their rows are in the static buffers when the recording begins."""
    engine.window([3] * ROWS)
    before = [t.clone() for t in vars(engine.requests).values()], engine.model.cache.clone()
    recorded(form, engine, recorder, sizes=(ROWS, 2))
    for was, now in zip(before[0], vars(engine.requests).values(), strict=True):
        assert torch.equal(was, now)
    assert torch.equal(before[1][:-1], engine.model.cache[:-1])


@pytest.mark.parametrize("form", FORMS)
def test_padded_and_changing_batches(engine, recorder, form):
    """Batches of one to five rows in graphs for two and five, in any order, budgets by row."""
    graphs = recorded(form, engine, recorder, sizes=(ROWS, 2))
    batches = [[3], [0, 4], [1, 2, 0], [4, 3, 2, 1], [0, 1, 2, 3, 4]]
    for turn in range(45):
        rows = batches[turn % len(batches)]
        budget = [1 + (turn + row) % 4 for row in rows]
        num_rows = 2 if len(rows) <= 2 else ROWS
        engine.window(budget, rows=rows, num_rows=num_rows, graphs=graphs, logprobs=False)
    assert engine.outputs == emitted()
    assert engine.model.begun == 0


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_recorded_runs_eagerly(engine, recorder, form):
    """Logprobs, and a batch size without a graph; in between recorded windows."""
    graphs = recorded(form, engine, recorder)
    for _ in range(12):
        engine.window([3] * ROWS, graphs=graphs, logprobs=False)
        engine.window([2] * 3, graphs=graphs, num_rows=3, logprobs=False)
        engine.window([2] * ROWS, graphs=graphs, logprobs=True)
    assert engine.outputs == emitted()
    assert 12 < engine.model.begun <= 24


@pytest.mark.parametrize("form", FORMS)
def test_sampled_tokens_logprobs_are_recorded_with_the_step(engine, recorder, form):
    """Rows of different budgets, some of which stop on the way; other windows in between."""
    graphs = recorded(form, engine, recorder)
    for turn in range(18):
        budget = [1 + (turn + row) % 7 for row in range(ROWS)]
        if turn % 3 == 2:
            engine.window(budget, graphs=graphs, logprobs=False)
        else:
            engine.window(budget, graphs=graphs, logprobs=False, sampled_logprobs=True)
            tokens = list(chain(*engine.result.token_ids))
            assert engine.result.logprob_token_ids[:, 0].tolist() == tokens
            # The model's logits are 1 at the token and 0 elsewhere.
            wanted = 1 - np.log(np.e + VOCAB - 1)
            np.testing.assert_allclose(engine.result.logprobs, wanted, rtol=1e-5)
            assert engine.result.logprobs.shape == (len(tokens), 1)
            assert engine.result.ranks.tolist() == [1] * len(tokens)
    assert engine.model.begun == 0
    assert engine.outputs == emitted()


@pytest.mark.parametrize("form", FORMS)
def test_grammars_are_recorded_with_the_step(engine, recorder, form):
    """Masks and walks are at fixed addresses; a window goes on where the last one ended."""
    graphs = recorded(form, engine, recorder, grammars=True)
    engine.constrain()
    for turn in range(18):
        budget = [1 + (turn + row) % 7 for row in range(ROWS)]
        engine.window(budget, graphs=graphs, logprobs=False, sampled_logprobs=turn % 2 == 0)
    assert engine.model.begun == 0
    assert engine.outputs == emitted(grammars=True) != emitted()


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_takes_the_graph_of_its_adapters(engine, recorder, form):
    graphs = recorded(form, engine, recorder)
    engine.window([1] * ROWS, graphs=graphs, logprobs=False, num_loras=2)
    assert engine.model.begun == 1  # nothing was recorded for two
    graphs.record(recorder, ROWS, 2)
    engine.model.begun = 0
    for num_loras in (2, 0):
        engine.window([1] * ROWS, graphs=graphs, logprobs=False, num_loras=num_loras)
    assert engine.model.begun == 0
    assert engine.outputs == [tokens[:3] for tokens in emitted()]


def test_the_device_ends_the_while_loop(engine, recorder, arrivals):
    """When no row is active, and after the step in which a request arrived; one turn at least."""
    graphs = recorded("while", engine, recorder)
    budget = [16] * ROWS
    arrivals.add()
    assert engine.window(budget, graphs=graphs, logprobs=False, arrivals_seen=0) == 1
    assert engine.window(budget, graphs=graphs, logprobs=False, arrivals_seen=1) == 16
    while any(len(out) < len(want) for out, want in zip(engine.outputs, emitted(), strict=True)):
        steps = engine.window(budget, graphs=graphs, logprobs=False)
    assert engine.outputs == emitted()
    assert steps < 16


@pytest.mark.parametrize("form", FORMS)
def test_a_full_house_ends_at_the_first_stop(engine, recorder, form):
    """The third request's first token is its last; an unrolled graph ends with its last step."""
    graphs = recorded(form, engine, recorder)
    steps = engine.window([16] * ROWS, graphs=graphs, logprobs=False, num_stops=1)
    assert steps == (UNROLLED_STEPS if form == "unrolled" else 1)


def test_an_unrolled_graph_is_followed_by_the_question(engine, recorder):
    """The request comes once the window has begun; before that, not a step would run."""
    graphs = recorded("unrolled", engine, recorder)
    for num_steps, steps_run in ((16, UNROLLED_STEPS), (3, 1)):
        comes = iter([False, True]).__next__
        steps = engine.window([num_steps] * ROWS, comes, graphs=graphs, logprobs=False)
        assert steps == steps_run


@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits_for_the_device(engine, recorder, form, device, monkeypatch):
    """Neither torch, which says so on CUDA, nor, on tapes, an operation of the window."""
    graphs = recorded(form, engine, recorder)
    slot = engine.windows.slots[0]
    engine.window([4] * ROWS, graphs=graphs, logprobs=False)
    engine.window([4] * ROWS, graphs=graphs, logprobs=False)
    replayed = []
    pace = AheadPace() if device == "cuda" else HostPace()
    stream = torch.cuda.Stream() if device == "cuda" else None
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    else:  # the steps themselves are the device's business
        monkeypatch.setattr(
            "fusedstep.ops.launch.Launch.__call__", lambda launch: replayed.append(launch)
        )
        for graph in (*graphs._single.values(), *graphs._many.values()):
            monkeypatch.setattr(graph, "replay", lambda: replayed.append("steps"))
        monkeypatch.setattr("fusedstep.window.pace.HostPace.goes_on", lambda *_: True)
    try:
        with SyncTrap(allocations=False):
            _one_window(engine, slot, graphs, pace, stream)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    if device == "cpu":
        assert replayed.count("steps") == (4 if form != "while" else 1)


def _one_window(engine, slot, graphs, pace, stream):
    """All that the host does for a window but reading its result."""
    slot.stage(np.arange(ROWS), np.full(ROWS, 4, dtype=np.int32), -1, VARIANTS[0])
    run_window(engine.model, engine.ops, slot, lambda: False, pace, graphs)
    Fetched(slot, stream)


def test_a_form_that_fails_leaves_no_graphs(engine):
    class Broken(TapeRecorder):
        def record(self, body):
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorded("replay", engine, Broken())
    engine.window([5] * ROWS)  # the engine goes on
    assert engine.outputs == [tokens[:5] for tokens in emitted()]


def test_after_a_recording_that_fails(engine, recorder, device):
    """Random numbers are drawn, and the next recording works."""
    if device == "cpu":
        pytest.skip("a tape cannot fail like a GPU's graph: tests/standin has that")
    with pytest.raises(RuntimeError, match="capturing"):
        recorder.record(lambda: torch.ones(1).item())
    assert torch.rand(3).shape == (3,)
    graphs = recorded("replay", engine, recorder)
    engine.window([5] * ROWS, graphs=graphs, logprobs=False)
    assert engine.outputs == [tokens[:5] for tokens in emitted()]


@pytest.mark.parametrize("asked", ["adjustment", "min_p", "truncation", "logprobs", None])
def test_a_variant_does_what_is_asked(asked):
    needs = BatchNeeds(**{name: name == asked for name in vars(BatchNeeds())})
    chosen = variant(needs)
    assert chosen in VARIANTS
    assert asked is None or getattr(chosen, asked)
    assert chosen == VARIANTS[{None: 0, "logprobs": 2}.get(asked, 1)]
