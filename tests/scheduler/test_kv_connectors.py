"""KV connectors: which of them windows go with, and turns while one loads."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock, patch

import late_kv
import pytest
from scheduler.trace import Spec, Trace
from scheduler.world import STOCK, make_request, make_scheduler
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from fusedstep.reasons import Reason
from fusedstep.vllm_plugin import reasons, stamps
from fusedstep.vllm_plugin.scheduler.admission import Admission
from fusedstep.vllm_plugin.scheduler.scheduler import FusedStepScheduler

HERE, THERE = 0, 1  # where the prompts of the two requests are computed
TRACE = Trace((Spec((1, 2, 3), 0, 60, ignore_eos=True), Spec(tuple(range(9)), 0, 40)))


@pytest.fixture
def reason_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The reason that an engine with this connector has no windows."""
    config: Any = make_scheduler(TRACE, STOCK[True]).vllm_config
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")

    def reason_of(name: str, role: str = "kv_consumer", **fields: Any) -> str | None:
        config.kv_transfer_config = KVTransferConfig(kv_connector=name, kv_role=role, **fields)
        return reasons.engine_reason(config)

    reason_of.config = config  # type: ignore[attr-defined]
    return reason_of


@pytest.mark.parametrize("role", ("kv_consumer", "kv_producer", "kv_both"))
def test_connectors_that_windows_go_with(reason_of: Any, role: str) -> None:
    assert reason_of("ExampleConnector", role) is None
    assert reason_of("LateConnector", role, kv_connector_module_path="late_kv") is None


def test_a_connector_of_which_nothing_is_known(
    reason_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subclass may save what the class that it is made from does not."""
    heir = type("Heir", (late_kv.LateConnector,), {})
    namesake = type("ExampleConnector", (late_kv.SilentConnector,), {})
    for each in heir, namesake, late_kv.SilentConnector:
        monkeypatch.setattr(late_kv, each.__name__, each, raising=False)
        reason = reason_of(each.__name__, kv_connector_module_path="late_kv")
        assert reason == f"KV connector {each.__name__}"
    assert reason_of("MultiConnector") == "KV connector MultiConnector"


def test_what_no_connector_was_tried_with(reason_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(reason_of.config.model_config), "is_hybrid", True)
        assert reason_of("ExampleConnector") == "KV connector with recurrent states"
    with monkeypatch.context() as patch:
        patch.setattr(reason_of.config.parallel_config, "tensor_parallel_size", 2)
        named = "KV connector ExampleConnector with tensor parallelism"
        assert reason_of("ExampleConnector") == named
        assert reason_of("LateConnector", kv_connector_module_path="late_kv") is None
    with monkeypatch.context() as patch:
        patch.setattr(reason_of.config, "device_config", MagicMock(device_type="cuda"))
        assert reason_of("ExampleConnector") == "KV connector on a device that is not a CPU"
    assert reason_of("ExampleConnector") is None
    spec = MagicMock(method="ngram", num_speculative_tokens=2, parallel_drafting=False)
    spec.enable_adaptive_verification = False
    spec.uses_dynamic_speculative_decoding.return_value = False
    reason_of.config.speculative_config = spec
    assert reason_of("ExampleConnector") == "speculative decoding with a KV connector"


def connector() -> Any:
    """It loads the first 8 tokens of a prompt that has so many, and says when it has."""
    made = MagicMock(spec=KVConnectorBase_V1)
    made.supports_divergent_local_hybrid_hits = made.requires_kv_delivery = False
    made.has_pending_block_frees.return_value = False
    made.get_loaded_kv_cache_group_ids.return_value = ()
    made.request_finished.return_value = False, None
    made.take_events.return_value = ()
    made.get_num_new_matched_tokens.side_effect = lambda request, _: (
        (8, True) if request.num_tokens > 8 else (0, False)
    )
    return made


def nothing_fits(scheduler: Any) -> None:
    """As if a turn had shown that no waiting request fits."""
    scheduler.admission.blocked, scheduler.admission.min_blocks = True, TRACE.num_blocks


def turn(scheduler: Any, received: set[str] | None = None, sent: set[str] | None = None) -> Any:
    """A turn in which every request gets a token; ``received``: ids whose loads are done;
    ``sent``: of requests that have ended, and whose blocks are sent."""
    output = scheduler.schedule()
    if received or sent:
        nothing_fits(scheduler)  # another one that waits
    ids = list(output.num_scheduled_tokens)
    result = ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={i: n for n, i in enumerate(ids)},
        sampled_token_ids=[[7] for _ in ids],
        kv_connector_output=KVConnectorOutput(finished_recving=received, finished_sending=sent),
    )
    scheduler.update_from_output(output, result)
    return output


@pytest.fixture
def scheduler() -> Any:
    """One request decodes."""
    made: Any = make_scheduler(TRACE, FusedStepScheduler, "auto")
    made.connector = connector()
    made.add_request(make_request(TRACE, HERE))
    turn(made)
    assert max(turn(made).num_scheduled_tokens.values()) > 1
    return made


def test_turns_while_a_connector_loads(scheduler: Any) -> None:
    """Stock steps from the one with which the load begins; the request is let in at once."""
    there = make_request(TRACE, THERE)
    scheduler.add_request(there)
    nothing_fits(scheduler)
    first = turn(scheduler)
    assert scheduler.admission.awaits_kv and max(first.num_scheduled_tokens.values()) > 1
    assert stamps.stock_step_of(first) == Reason.REMOTE_KV
    assert scheduler.admission.num_startable == 0
    second = turn(scheduler)
    third = turn(scheduler, received={there.request_id})
    for output in second, third:
        assert list(output.num_scheduled_tokens.values()) == [1]
        assert stamps.stock_step_of(output) == Reason.REMOTE_KV
    assert scheduler.last_decision.reason == Reason.REMOTE_KV
    assert not scheduler.admission.awaits_kv and scheduler.admission.may_admit
    joined = turn(scheduler)
    assert [new.req_id for new in joined.scheduled_new_reqs] == [there.request_id]
    assert stamps.stock_step_of(joined) is None
    assert max(turn(scheduler).num_scheduled_tokens.values()) > 1


def test_a_request_of_which_the_connector_does_not_know_yet(scheduler: Any) -> None:
    """It is asked in every turn: a window that may be long ends within the latency."""
    scheduler.connector.get_num_new_matched_tokens.side_effect = lambda *_: (None, False)
    scheduler.add_request(make_request(TRACE, THERE))
    turn(scheduler)
    assert scheduler.admission.joins_anytime and not scheduler.admission.awaits_kv
    scheduler.connector = None
    assert not scheduler.admission.joins_anytime


def test_turns_while_a_connector_keeps_blocks(scheduler: Any) -> None:
    """The end of a step tells that they are sent: windows end within the latency if a request may
    wait for them, and the turn after that lets it in."""
    scheduler.connector.request_finished.return_value = True, None
    gone = make_request(TRACE, THERE)
    scheduler.connector.get_num_new_matched_tokens.side_effect = lambda *_: (0, False)
    scheduler.add_request(gone)
    turn(scheduler)
    scheduler.finish_requests(gone.request_id, RequestStatus.FINISHED_ABORTED)
    turn(scheduler)
    assert scheduler.admission.connector_keeps_blocks and not scheduler.admission.joins_anytime
    waiting = make_request(TRACE, THERE)
    waiting.request_id = "waiting"
    scheduler.add_request(waiting)
    assert scheduler.admission.joins_anytime
    with patch.object(Admission, "num_places", 0):
        assert not scheduler.admission.joins_anytime
    nothing_fits(scheduler)
    with patch.object(scheduler.kv_cache_manager, "allocate_slots", some_have_room(scheduler)):
        turn(scheduler, sent={gone.request_id})
    assert not scheduler.admission.connector_keeps_blocks
    assert scheduler.admission.may_admit and not scheduler.admission.joins_anytime
    assert [new.req_id for new in turn(scheduler).scheduled_new_reqs] == [waiting.request_id]


def some_have_room(scheduler: Any) -> Any:
    """``allocate_slots`` that has nothing for newcomers."""
    allocate, running = scheduler.kv_cache_manager.allocate_slots, [*scheduler.running]

    def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
        return allocate(request, *args, **kwargs) if request in running else None

    return allocate_slots
