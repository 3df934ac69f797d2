"""The loop with a small torch model instead of vLLM: windows of any length give the same tokens."""

from importlib.util import find_spec

import pytest
import torch
from window.engine import MAX_TOKENS, PROMPTS, Engine, emitted

from fusedstep.ops.dispatch import load
from fusedstep.window.arrivals import END_AFTER_ONE_STEP, NEVER_END, ArrivalCounter
from fusedstep.window.pace import AheadPace, SetPace

CPU = torch.device("cpu")


def pytest_generate_tests(metafunc):
    """Windows of any length run on all step operations of the device, the other tests on one."""
    if "step_ops" in metafunc.fixturenames:
        on_cpu = metafunc.config.getoption("--device") == "cpu"
        names = ["native", "reference"] * on_cpu + ["triton"] * bool(find_spec("triton"))
        metafunc.parametrize(
            "step_ops", names if "num_steps" in metafunc.fixturenames else names[:1]
        )


@pytest.fixture
def engine(step_ops, device):
    with torch.device(device):
        yield Engine(load(step_ops), PROMPTS, MAX_TOKENS, torch.device(device))


@pytest.mark.parametrize("num_steps", [1, 7])
def test_windows_of_any_length(engine, num_steps):
    for _ in range(-(-max(MAX_TOKENS) // num_steps)):
        engine.window([num_steps] * len(PROMPTS))
    assert engine.outputs == emitted()
    assert engine.window([num_steps] * len(PROMPTS)) == 0  # all have stopped: no forward
    assert engine.model.ended <= engine.model.forwards


def test_budgets_differ_by_row(engine):
    """A row with fewer steps waits; its tokens go on in the next window."""
    for turn in range(40):
        engine.window([1 + (turn + row) % 5 for row in range(len(PROMPTS))])
    assert engine.outputs == emitted()


def test_an_arrival_ends_the_window_after_its_step(engine, tmp_path):
    counter = ArrivalCounter(f"test-{tmp_path.name}")
    counter.unlink()
    stock_forward, engine.model.forwards = engine.model.forward, 0

    def forward():  # a request arrives during the third step
        if engine.model.forwards == 2:
            counter.add()
        return stock_forward()

    engine.model.forward = forward
    budget = [16] * len(PROMPTS)
    assert engine.window(budget, lambda: counter.exceeds(0)) == 3
    assert engine.window(budget, lambda: counter.exceeds(0), arrivals_seen=0) == 0  # gives way
    assert (
        engine.window(
            budget, lambda: counter.exceeds(END_AFTER_ONE_STEP), arrivals_seen=END_AFTER_ONE_STEP
        )
        == 1
    )
    assert engine.window([1, 1, 1], lambda: counter.exceeds(0), arrivals_seen=0) == 1
    assert engine.window(budget, lambda: counter.exceeds(1)) == 16  # the scheduler has seen it
    for _ in range(5):
        engine.window(budget, lambda: counter.exceeds(NEVER_END))
    assert engine.outputs == emitted()


def test_a_full_house_ends_at_the_first_stop(engine):
    """The third request has one token to give; then the first two have stopped or wait again."""
    budget = [16] * len(PROMPTS)
    assert engine.window(budget, num_stops=1) == 1
    stopped = 1
    while engine.outputs != emitted():
        steps = engine.window(budget, num_stops=1)
        now = sum(map(list.__eq__, engine.outputs, emitted()))
        assert (steps < 16) <= (now > stopped)
        stopped = now


def test_all_steps_are_run_where_others_count_on_them(engine):
    """After the last row has stopped, too; such steps give no token."""
    budget = [7] * len(PROMPTS)
    for _ in range(2 + max(MAX_TOKENS) // 7):
        engine.window(budget, pace=SetPace(), num_stops=1)
        assert engine.steps_enqueued == 7
    assert engine.outputs == emitted()


class LateDevice:
    """Events of a device that finishes a step only when the host waits for it."""

    recorded = waited = 0

    def record(self):
        type(self).recorded += 1

    def synchronize(self):
        type(self).waited += 1


@pytest.mark.parametrize("ahead", [1, 2])
def test_the_host_runs_only_a_little_ahead(monkeypatch, ahead):
    """Rows that have stopped are noticed ``ahead`` steps late; those steps give nothing."""
    device = type("Device", (LateDevice,), {})
    monkeypatch.setattr(torch.cuda, "Event", lambda *, blocking: device())
    pace = AheadPace(ahead)
    engine, in_step = (Engine(load("native"), PROMPTS, MAX_TOKENS, CPU) for _ in range(2))
    extra = []
    for _ in range(4):
        engine.window([16] * len(PROMPTS), pace=pace)
        extra.append(engine.steps_enqueued)
    needed = [in_step.window([16] * len(PROMPTS)) for _ in range(4)]
    assert engine.outputs == in_step.outputs
    assert extra == [min(steps + ahead, 16) for steps in needed]
    assert device.waited == device.recorded - 4 * ahead > 0


def test_two_processes_share_the_counter(tmp_path):
    ours, theirs = (ArrivalCounter(f"test-{tmp_path.name}") for _ in range(2))
    ours.unlink()
    ours.add(3)
    assert theirs.count == 3 and theirs.exceeds(2) and not theirs.exceeds(3)
    assert ours.can_end_windows  # until a worker says otherwise
    theirs.can_end_windows = False
    assert not ours.can_end_windows and ours.count == 3
    assert not ours.path.exists()


def test_an_error_in_the_forward_leaves_the_window(engine):
    def forward():
        raise RuntimeError("device lost")

    engine.model.forward = forward
    with pytest.raises(RuntimeError, match="device lost"):
        engine.window([4] * len(PROMPTS))
    assert engine.model.ended == 1
