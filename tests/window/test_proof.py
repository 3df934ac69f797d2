"""The proof before a form serves: honest graphs pass, and every kind of wrong one is found."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from window.engine import BLOCK, FORMS, MAX_LEN, ROWS, recorded
from window.tape import Tape

from fusedstep.window.graphs import VARIANTS
from fusedstep.window.proof import Proof, WrongTokensError

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="there is no Triton for this platform"
)


def proof(engine, graphs, max_num_blocks=ROWS * MAX_LEN // BLOCK - 1):
    def stage(seq_lens, _):
        has_two = (2, 0, VARIANTS[0]) in graphs._many | graphs._single
        return 2 if len(seq_lens) <= 2 and has_two else ROWS, 0

    stream = torch.cuda.Stream() if engine.requests.stopped.is_cuda else None
    return Proof(engine.state, graphs, max_num_blocks, stage, stream)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_num_blocks", [ROWS * MAX_LEN // BLOCK - 1, 9])
def test_recorded_steps_pass(engine, recorder, form, max_num_blocks):
    """Also where there are blocks for two requests only; the proof leaves the requests alone."""
    blocks = [table.clone() for table in engine.state.block_tables]
    before = {name: t.clone() for name, t in vars(engine.requests).items()}
    graphs = recorded(form, engine, recorder, sizes=(ROWS, 2))
    for num_rows in (ROWS, 2):
        proof(engine, graphs, max_num_blocks).check(num_rows)
    for name, tensor in vars(engine.requests).items():
        assert torch.equal(tensor, before[name]), name
    assert not torch.equal(engine.state.block_tables[0], blocks[0])  # the runner's to fill again


def skip_a_step(step, graphs):
    return SimpleNamespace(replay=lambda: None)


def forget_the_last_launch(step, graphs):
    if not isinstance(step, Tape):
        pytest.skip("nothing can be taken out of a GPU's graph")
    step.entries.pop()
    return step


def look_at_an_old_input(step, graphs):
    """As if the recorded model read a copy of its input ids."""
    inputs = graphs.model.inputs
    stale = inputs.input_ids.clone()

    def replay():
        inputs.input_ids.copy_(stale)
        step.replay()

    return SimpleNamespace(replay=replay)


@pytest.mark.parametrize("break_it", [skip_a_step, forget_the_last_launch, look_at_an_old_input])
@pytest.mark.parametrize("variant", [0, 1])
def test_wrong_steps_are_found(engine, recorder, break_it, variant):
    graphs = recorded("replay", engine, recorder)
    key = list(graphs._single)[variant]
    graphs._single[key] = break_it(graphs._single[key], graphs)
    with pytest.raises(WrongTokensError, match="not those of the eager loop"):
        proof(engine, graphs).check(ROWS)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ("E R E E E", "not those of the eager loop"),  # the eager loop repeats itself
        ("E R E V", None),  # it does not: other tokens mean nothing
        ("E S V", "stops elsewhere"),  # what must be the same all the same
    ],
)
def test_an_eager_loop_that_varies(monkeypatch, runs, words):
    """Kernels that add in any order give other tokens from run to run."""
    tokens = {"E": [[1, 2]], "R": [[1, 3]], "V": [[4, 2]], "S": [[1]]}
    left = iter((runs + " E E" * (len(VARIANTS) - 1)).split())
    monkeypatch.setattr(Proof, "_tokens", lambda *_: tokens[next(left)])
    one = object.__new__(Proof)
    one.state = SimpleNamespace(requests=SimpleNamespace(), grammar=None)
    one.graphs, one.max_num_reqs = SimpleNamespace(variants=VARIANTS), 5
    if words is None:
        one.check(5)
        return
    with pytest.raises(WrongTokensError, match=words):
        one.check(5)
