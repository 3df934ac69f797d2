"""What waits for a client stays one token per output."""

from __future__ import annotations

import asyncio

import pytest
from vllm.outputs import STREAM_FINISHED, CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from fusedstep.vllm_plugin.frontend import collector
from fusedstep.vllm_plugin.frontend.collector import TokenCollector

DELTA, CUMULATIVE = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE


def output(
    text: str, index: int = 0, *, finished: bool = False, tokens: list[int] | None = None
) -> RequestOutput:
    ids = [ord(text[-1])] if tokens is None else tokens
    completion = CompletionOutput(index, text, ids, 0.0, None)
    return RequestOutput("r", None, [1], None, [completion], finished)


def drain(queue: RequestOutputCollector) -> list[list[tuple[int, str]]]:
    found = []
    while (out := queue.get_nowait()) is not None:
        found.append([(completion.index, completion.text) for completion in out.outputs])
    assert not queue.ready.is_set()
    return found


def test_tokens_that_wait_are_kept_apart_in_their_order() -> None:
    queue, stock = TokenCollector(DELTA, "r"), RequestOutputCollector(DELTA, "r")
    for one in (queue, stock):
        for text in "abc":
            one.put(output(text, finished=text == "c"))
    assert drain(queue) == [[(0, "a")], [(0, "b")], [(0, "c")]]
    assert drain(stock) == [[(0, "abc")]]  # what it is for


def test_choices_of_one_step_stay_one_output() -> None:
    queue = TokenCollector(DELTA, "r")
    for text in "abc":
        for index in (0, 1):
            queue.put(output(text, index))
    queue.put(output("d", 1, finished=True))
    assert drain(queue) == [[(0, text), (1, text)] for text in "abc"] + [[(1, "d")]]


def test_error_comes_after_the_tokens_and_nothing_after_it() -> None:
    queue = TokenCollector(DELTA, "r")
    queue.put(output("a"))
    queue.put(EngineDeadError())
    queue.put(output("b"))
    assert asyncio.run(queue.get()).outputs[0].text == "a"
    with pytest.raises(EngineDeadError):
        asyncio.run(queue.get())
    assert queue.get_nowait() is None


def test_end_of_streamed_input_is_an_output_of_its_own() -> None:
    """vLLM knows it by identity, and it is shared by all requests."""
    queue = TokenCollector(DELTA, "r")
    queue.put(output("a"))
    queue.put(STREAM_FINISHED)
    assert not queue.get_nowait().finished  # type: ignore[union-attr]
    assert queue.get_nowait() is STREAM_FINISHED
    assert STREAM_FINISHED.outputs == []


def test_cumulative_output_that_waits_does_not_grow() -> None:
    queue = TokenCollector(CUMULATIVE, "r")
    tokens: list[int] = []  # the detokenizer's
    for text in ("a", "ab", "abc"):
        tokens.append(ord(text[-1]))
        queue.put(output(text, tokens=tokens))
    waiting = [queue.get_nowait() for _ in range(3)]
    assert [out.outputs[0].text for out in waiting if out] == ["a", "ab", "abc"]
    assert [len(out.outputs[0].token_ids) for out in waiting if out] == [1, 2, 3]


def test_consumer_that_waits_is_woken() -> None:
    async def consume() -> list[str]:
        queue = TokenCollector(DELTA, "r")
        asyncio.get_running_loop().call_later(0.01, lambda: [queue.put(output(t)) for t in "ab"])
        return [(queue.get_nowait() or await queue.get()).outputs[0].text for _ in range(2)]

    assert asyncio.run(asyncio.wait_for(consume(), 5)) == ["a", "b"]


def test_client_that_does_not_read_takes_no_memory_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collector, "MOST_WAITING", 2)
    queue = TokenCollector(DELTA, "r")
    for text in "abcd":
        queue.put(output(text, finished=text == "d"))
    first, last = queue.get_nowait(), queue.get_nowait()
    assert first and last and (first.outputs[0].text, last.outputs[0].text) == ("a", "bcd")
    assert last.outputs[0].token_ids == [98, 99, 100] and last.finished
