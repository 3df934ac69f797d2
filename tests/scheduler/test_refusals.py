"""What the scheduler answers by itself: input that does not fit, ids in use; one half made."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from scheduler.engine import Engine
from scheduler.simulate import left_behind
from scheduler.trace import Spec, Trace, expected, make_trace
from scheduler.world import STOCK, make_request, make_scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from fusedstep.vllm_plugin.scheduler.scheduler import FusedStepScheduler

LONGEST = 20
PIECE = Spec((1, 2, 3, 4, 5, 6), 0, max_tokens=2, ignore_eos=True)
TRACE = Trace((PIECE, PIECE), max_model_len=LONGEST, decode_steps="auto")
OTHER = 1


def piece(number: int = 0, *, last: bool = False, client: int = 0) -> Request:
    """A piece of input for a session; ``last``: vLLM's mark that no more come."""
    request = make_request(TRACE, number)
    request.resumable, request.client_index = not last, client
    return request


def turn(scheduler: Any, lengths: list[int] | None = None) -> list[tuple[str, list[int], Any]]:
    """One turn of the engine, a token for each request that is past its prompt: what it answers.

    ``lengths`` takes the prompt lengths that reach the worker.
    """
    output = scheduler.schedule()
    ids = list(output.num_scheduled_tokens)
    if lengths is not None:
        lengths += [len(new.prefill_token_ids) for new in output.scheduled_new_reqs]
    tokens = [[7] if not scheduler.requests[i].is_prefill_chunk else [] for i in ids]
    result = ModelRunnerOutput(
        req_ids=ids, req_id_to_index={i: n for n, i in enumerate(ids)}, sampled_token_ids=tokens
    )
    answers = scheduler.update_from_output(output, result)
    return [
        (one.request_id, one.new_token_ids, one.finish_reason)
        for client in answers.values()
        for one in client.outputs
    ]


def run(scheduler: Any, lengths: list[int]) -> list[Any]:
    """To the next rest: how every piece's answer ended."""
    answers = []
    while scheduler.has_requests():
        answers += turn(scheduler, lengths)
    return [(name, reason) for name, _, reason in answers if reason is not None]


@pytest.mark.parametrize("together", (False, True), ids=("one by one", "queued"))
@pytest.mark.parametrize("decode_steps", ("1", "auto"))
def test_a_piece_too_many_ends_with_length(decode_steps: str, together: bool) -> None:
    """6 tokens and a computed answer per piece: the third would reach 20. Nor does a shorter one
    come after it: the session's text would lack the piece."""
    scheduler: Any = make_scheduler(TRACE, FusedStepScheduler, decode_steps)
    lengths: list[int] = []
    ended = []
    for _ in range(4):
        scheduler.add_request(piece())
        if not together:
            ended += run(scheduler, lengths)
    short = piece()
    short.prompt_token_ids = [1]
    scheduler.add_request(short)
    ended += run(scheduler, lengths)
    assert ended == [("0", FinishReason.LENGTH)] * 5
    assert lengths == [6, 13] and "0" in scheduler.requests
    scheduler.add_request(piece(last=True))
    run(scheduler, lengths)
    assert not scheduler.requests and not scheduler.refusals.full
    scheduler.add_request(piece())  # the id is free again
    assert run(scheduler, lengths) == [("0", FinishReason.LENGTH)] and lengths[2:] == [6]


def test_stock_lets_the_piece_pass() -> None:
    """The control: what reaches the worker is longer than its row."""
    scheduler: Any = make_scheduler(TRACE, STOCK[True])
    lengths: list[int] = []
    for _ in range(3):
        scheduler.add_request(piece())
        run(scheduler, lengths)
    assert max(lengths) >= LONGEST


def test_a_request_that_no_frontend_of_ours_has_seen() -> None:
    scheduler: Any = make_scheduler(TRACE, FusedStepScheduler, "auto")
    long, wide = make_request(TRACE, 0), make_request(TRACE, 0)
    long.num_prompt_tokens = LONGEST
    wide.request_id = "wide"
    wide.sampling_params.allowed_token_ids = [1] * 1025
    for request in (make_request(TRACE, OTHER), long, wide):
        scheduler.add_request(request)
    answers = run(scheduler, [])
    assert sorted(answers, key=str) == [
        ("0", FinishReason.LENGTH),
        ("1", FinishReason.LENGTH),
        ("wide", FinishReason.ERROR),
    ]


def test_an_id_in_use() -> None:
    """The engine goes on: the first request gets its answer, another client's an error."""
    scheduler: Any = make_scheduler(TRACE, FusedStepScheduler, "auto")
    for client in (0, 0, 1):
        request = make_request(TRACE, 0)
        request.client_index = client
        scheduler.add_request(request)
    answers = []
    while scheduler.has_requests():
        answers += turn(scheduler)
    assert ("0", [], FinishReason.ERROR) in answers
    assert [t for _, tokens, _ in answers for t in tokens] == [7, 7]


@pytest.mark.parametrize("seed", range(12))
def test_reused_ids_with_one_step_per_turn(seed: int) -> None:
    trace = replace(make_trace(Random(seed), 40), cut=0.0)
    engine = Engine(trace, FusedStepScheduler, "1")
    engine.device.fused = False
    engine.run()
    for answer, spec in zip(engine.answers, trace.specs, strict=True):
        if answer.reason != "abort" or spec.aborted_after is None:
            assert (answer.tokens, answer.reason) == expected(spec, trace.max_model_len)
    assert left_behind(engine) == []


def test_batches_of_text_models_have_nothing_that_a_window_leaves_out() -> None:
    from fusedstep.vllm_plugin.runner import parts

    scheduler: Any = make_scheduler(TRACE, FusedStepScheduler, "auto")
    scheduler.add_request(make_request(TRACE, 0))
    output = scheduler.schedule()
    assert output.num_scheduled_tokens and parts.batch_reason(output) is None
    for name in parts.OTHER:
        batch = replace(output, **{name: ["something"]})
        assert parts.batch_reason(batch) == f"a batch with {name.replace('_', ' ')}"
    assert "has_sync_kv_loads" in parts.OTHER


def test_without_init() -> None:
    """As tests of vLLM make a scheduler: with vLLM's attributes alone it is vLLM's scheduler."""
    stock: Any = make_scheduler(TRACE, STOCK[True])
    scheduler: Any = object.__new__(FusedStepScheduler)
    vars(scheduler).update(vars(stock))
    for number in (0, 1):
        scheduler.add_request(make_request(TRACE, number))
    scheduler.announce_abort(["1"])
    assert turn(scheduler)
    scheduler.finish_requests(["1"], RequestStatus.FINISHED_ABORTED)
    assert [reason for _, reason in run(scheduler, [])] == [FinishReason.LENGTH]
    assert scheduler.make_spec_decoding_stats(None, 3, 1, None, "1") is None
    scheduler.shutdown()


def test_outputs_without_init() -> None:
    """Nothing of ours is set, nor of vLLM what its own method does not read."""
    stock: Any = make_scheduler(TRACE, STOCK[True])
    scheduler: Any = object.__new__(FusedStepScheduler)
    vars(scheduler).update({k: v for k, v in vars(stock).items() if k not in ("running", "policy")})
    output = stock.schedule()
    result = ModelRunnerOutput(req_ids=[], req_id_to_index={}, sampled_token_ids=[])
    scheduler.log_stats = False
    assert scheduler.update_from_output(output, result) == {}
