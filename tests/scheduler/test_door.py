"""Announcements between the engine core's threads, and what the scheduler makes of odd guests."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler.engine import Engine
from scheduler.trace import Spec, Trace
from scheduler.world import make_request, make_scheduler
from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc
from vllm.v1.request import RequestStatus

from fusedstep.loop_forms import LoopForm
from fusedstep.policy import DecodeSteps
from fusedstep.reasons import Reason
from fusedstep.vllm_plugin.scheduler import door as arrivals
from fusedstep.vllm_plugin.scheduler.door import Door
from fusedstep.vllm_plugin.scheduler.scheduler import FusedStepScheduler
from fusedstep.window.arrivals import END_AFTER_ONE_STEP, ArrivalCounter

LONG = Spec((1, 2, 3), 0, 390, ignore_eos=True)


@pytest.fixture
def door() -> Door:
    counter = ArrivalCounter("test-door")
    counter.unlink()
    return Door(counter)


def test_who_is_on_the_way_leaves_one_step(door: Door) -> None:
    before = door.counter.count
    assert door.seen(before) == before
    door.announce_request("a")
    assert door.counter.count == before + 1 and door.seen(before + 1) == END_AFTER_ONE_STEP
    door.announce_abort(["b"])
    assert door.counter.count == before + 2
    door.received("a")
    assert door.seen(before + 1) == END_AFTER_ONE_STEP
    door.is_open = False
    assert door.seen(before + 1) == before + 1
    door.is_open = True
    door.aborts_received(["b", "never announced"])
    door.received("never announced")
    assert door.seen(before + 1) == before + 1 and door.counter.exceeds(before)


@pytest.mark.parametrize(
    ("rejected", "left", "outside"),
    ((True, False, set()), (False, False, {"a"}), (True, True, {"a"})),
    ids=("rejected", "taken", "passed on"),
)
def test_who_is_rejected_is_on_the_way_no_more(
    door: Door, rejected: bool, left: bool, outside: set[str]
) -> None:
    """vLLM 0.33 does so while it is paused. One whose KV has to be freed goes to the scheduler."""
    reject = arrivals._shuts_the_door(lambda _, __: rejected)
    door.announce_request("a")
    core = SimpleNamespace(scheduler=SimpleNamespace(door=door))
    assert reject(core, SimpleNamespace(request_id="a", abort_immediately=left)) is rejected
    assert door.outside == outside
    assert reject(SimpleNamespace(scheduler=None), None) is rejected  # stock's scheduler


def test_an_id_comes_again_before_its_abort_is_with_the_scheduler(door: Door) -> None:
    for _ in range(2):
        door.announce_request("a")
    door.received("a")
    door.announce_abort(["a"])
    door.aborts_received(["a"])
    assert door.outside == {"a"}
    door.received("a")
    assert not door.outside


class Core:
    """Stands in for EngineCore's state."""

    scheduler: Any

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.aborts_queue = scheduler, queue.Queue[Any]()
        self.model_executor = SimpleNamespace(
            collective_rpc=lambda method: [None, f"asked for {method}"]
        )


def test_the_input_thread_announces(monkeypatch: pytest.MonkeyPatch, door: Door) -> None:
    def preprocess(self: Any, request: Any) -> Any:
        if request.request_id == "broken":
            raise ValueError(request.request_id)
        return request, 0

    monkeypatch.setattr(EngineCore, "__init__", Core.__init__)
    monkeypatch.setattr(EngineCore, "preprocess_add_request", preprocess)
    for proc in (EngineCoreProc, DPEngineCoreProc):
        monkeypatch.setattr(proc, "run_busy_loop", None)
    arrivals.announce_arrivals()
    patched = EngineCore.__init__, EngineCore.preprocess_add_request
    arrivals.announce_arrivals()
    assert patched == (EngineCore.__init__, EngineCore.preprocess_add_request)

    aborts: list[Any] = []
    scheduler = SimpleNamespace(
        door=door,
        announce_abort=aborts.append,
        engine_reason=None,
        decode_steps=DecodeSteps(),
    )
    scheduler.ask_workers = lambda executor: FusedStepScheduler.ask_workers(scheduler, executor)
    core: Any = EngineCore(scheduler)
    assert scheduler.engine_reason == "asked for no_windows_reason"
    before = door.counter.count
    request = SimpleNamespace(request_id="a")
    assert core.preprocess_add_request(request) == (request, 0)
    assert door.outside == {"a"} and door.counter.count == before + 1
    with pytest.raises(ValueError, match="broken"):
        core.preprocess_add_request(SimpleNamespace(request_id="broken"))
    door.is_open = False
    core.preprocess_add_request(SimpleNamespace(request_id="b"))
    assert door.outside == {"a", "b"} and door.counter.count == before + 1
    core.aborts_queue.put_nowait(["a"])
    assert aborts == [["a"]] and core.aborts_queue.get_nowait() == ["a"]
    in_its_place = ["a", "c"]
    core.aborts_queue.put_nowait(in_its_place)
    core.preprocess_add_request(request)  # the abort was of the one before
    assert core.aborts_queue.get_nowait() == ["c"] and in_its_place == ["a", "c"]

    stock: Any = EngineCore(SimpleNamespace())
    assert stock.preprocess_add_request(request) == (request, 0)
    stock.aborts_queue.put_nowait(["a"])
    assert stock.aborts_queue.get_nowait() == ["a"]


def test_a_core_that_loads_plug_ins_within_its_init(
    monkeypatch: pytest.MonkeyPatch, door: Door
) -> None:
    """As each does in a process of its own: its __init__ has begun when it is replaced."""
    for name in ("__init__", "preprocess_add_request"):
        monkeypatch.setattr(EngineCore, name, lambda *_: None)
    loops: list[Any] = []
    for proc in (EngineCoreProc, DPEngineCoreProc):
        monkeypatch.setattr(proc, "run_busy_loop", loops.append)
    asked: list[Any] = []
    aborts: list[Any] = []
    scheduler = SimpleNamespace(door=door, announce_abort=aborts.append, ask_workers=asked.append)
    core = Core(scheduler)
    arrivals.announce_arrivals()
    EngineCoreProc.run_busy_loop(core)
    assert loops == [core] and asked == [core.model_executor]
    core.aborts_queue.put_nowait(["a"])
    assert aborts == [["a"]]
    DPEngineCoreProc.run_busy_loop(core)  # vLLM's loop begins again after a fault
    assert loops == [core, core] and len(asked) == 1
    core.aborts_queue.put_nowait(["b"])
    assert aborts == [["a"], ["b"]]


def running(trace: Trace) -> Engine:
    """An engine whose first request decodes."""
    engine = Engine(trace, FusedStepScheduler, "auto")
    engine._arrive()
    with engine._device_time():
        for _ in range(4):
            engine._take_in()
            engine._turn()
    return engine


def test_a_grammar_that_is_compiled_does_not_stop_the_others() -> None:
    engine = running(Trace((LONG, Spec((1,), 1000, 3)), max_model_len=400, step_ms=5.0))
    scheduler = engine.scheduler
    request = make_request(engine.trace, 1)
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    request.structured_output_request = SimpleNamespace(grammar=None, is_grammar_ready=False)
    scheduler.add_request(request)
    reasons = []
    with engine._device_time():
        for _ in range(4):
            engine._turn()
            reasons.append(scheduler.last_decision)
    assert reasons[-1].num_steps == 9 and not reasons[-1].num_stops
    assert reasons[-1].reason == "a waiting request may get ready"
    assert scheduler.door.is_open


def test_stock_steps_for_what_the_device_cannot_do() -> None:
    engine = running(Trace((LONG, Spec((1,), 1000, 3)), max_model_len=400))
    request = make_request(engine.trace, 1)
    request.sampling_params.stop_token_ids = list(range(-129, 0))  # no token of the trace
    engine.numbers["1"] = 1
    engine.scheduler.add_request(request)
    decisions = set()
    with engine._device_time():
        for _ in range(12):
            engine._turn()
            decisions.add(engine.scheduler.last_decision.reason)
            if "1" not in engine.scheduler.requests:
                break
    assert "more than 128 stop token ids" in decisions and not engine.scheduler.stock_reasons


@pytest.mark.parametrize("ids", ["0", ["0"], iter(["0"])], ids=["str", "list", "iterator"])
def test_aborts_in_every_form(ids: Any) -> None:
    engine = running(Trace((LONG,), max_model_len=400))
    scheduler = engine.scheduler
    scheduler.announce_abort("0")
    assert scheduler.door.outside == {"0"}
    (gone,) = scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
    assert gone.request_id == "0" and not scheduler.door.outside and not scheduler.requests


def test_all_are_aborted_at_once() -> None:
    scheduler = running(Trace((LONG,), max_model_len=400)).scheduler
    assert len(scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)) == 1
    assert not scheduler.running


def test_the_form_that_runs_says_whether_a_window_can_be_ended() -> None:
    """Not the option: a worker may have fallen back to another form. Nor one on another machine."""
    trace = Trace([LONG])
    scheduler = Engine(trace, FusedStepScheduler, "auto").scheduler
    worker = scheduler.door.counter  # the same memory
    assert scheduler._turn(scheduler._look()).stoppable
    worker.can_end_windows = LoopForm.UNROLLED.can_be_ended
    assert not scheduler._turn(scheduler._look()).stoppable
    worker.can_end_windows = LoopForm.REPLAY.can_be_ended
    assert scheduler._turn(scheduler._look()).stoppable
    scheduler.shares_memory = False
    assert not scheduler._turn(scheduler._look()).stoppable


@pytest.mark.parametrize(("switch", "reason"), (("on", None), ("", Reason.NOT_SWITCHED_ON)))
def test_without_the_switch_all_steps_are_stock(switch: str, reason: str | None) -> None:
    """A scheduler named by hand, in processes where nobody announces or unfolds for it."""
    scheduler = make_scheduler(Trace((LONG,)), FusedStepScheduler, "auto", switch)
    assert scheduler.engine_reason == reason
