"""Grammars in the scheduler: their places, who may mask, and rows that have left their tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scheduler.trace import Spec, Trace
from scheduler.world import make_request, make_scheduler
from vllm.v1.outputs import ModelRunnerOutput

from fusedstep.grammar import OUTSIDE, Automaton, Vocabulary
from fusedstep.ops.types import REASONS
from fusedstep.vllm_plugin import grammar_tables
from fusedstep.vllm_plugin.scheduler import grammars
from fusedstep.vllm_plugin.scheduler.grammars import Grammars, ReasoningEnds, first_fit
from fusedstep.vllm_plugin.scheduler.scheduler import FusedStepScheduler

STOPS = frozenset([2])
VOCABULARY = Vocabulary.from_bytes([b"a", b"b", b"", b"ab"])


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Grammars:
    """Room for 10 states and as many masks."""
    monkeypatch.setattr(grammars, "warm", lambda: None)
    monkeypatch.setattr(grammar_tables, "MAX_STATES", 10)
    manager = SimpleNamespace(
        _create_grammar=None,
        _get_constraint_bounds=lambda *_: SimpleNamespace(constraint_start=0),
    )
    model = SimpleNamespace(get_vocab_size=lambda: 4)
    config = SimpleNamespace(model_config=model, speculative_config=None)
    table = Grammars(manager, config)
    table.vocabulary = VOCABULARY
    return table


def automaton(num_states: int, *, cut: bool = False) -> Automaton:
    """A ring: each byte leads to the next state; with ``cut``, from the last one outside."""
    table = np.repeat((np.arange(num_states) + 1)[:, None] % num_states, 256, axis=1)
    if cut:
        table[-1] = OUTSIDE
    ids = np.arange(num_states, dtype=np.int32)
    return Automaton(table.astype(np.int32), ids, np.full((num_states, 1), 15, np.int32))


def request(name: str, grammar: str, tokens: tuple[int, ...] = ()) -> Any:
    return SimpleNamespace(
        request_id=name,
        structured_output_request=SimpleNamespace(structured_output_key=grammar),
        sampling_params=SimpleNamespace(all_stop_token_ids=STOPS),
        output_token_ids=list(tokens),
        resumable=False,
        use_structured_output=True,
        is_prefill_chunk=False,
    )


def test_the_first_place_that_is_large_enough() -> None:
    taken = [(4, 2), (0, 3)]
    assert [first_fit(n, taken, 9) for n in (1, 2, 3, 4)] == [3, 6, 6, None]
    assert first_fit(9, [], 9) == 0


def test_places_are_shared_and_made_free(table: Grammars) -> None:
    for name, size in (("five", 5), ("four", 4), ("three", 3), ("eleven", 11)):
        table.known[name, STOPS] = automaton(size)
    first, again = request("1", "five"), request("2", "five", (0, 3))
    assert table.enter(first) is None and table.enter(again) is None
    assert table.enter(request("3", "four")) is None
    news = table.take_news()
    assert [(t.first_state, len(t.masks)) for t in news.tables] == [(0, 5), (5, 4)]
    assert news.tables[1].next_states[3, 0] == 5  # the last state leads to the first
    assert news.vocabulary is not None and news.rows["2"].state == 3  # after three bytes
    three = request("4", "three")
    assert table.enter(three) == "structured output: its tables are full"
    assert table.enter(request("5", "eleven")) == "structured output: its tables are full"
    assert table.leave(first) and table.enter(three) is not None  # the other still uses it
    assert table.leave(again) and table.enter(three) is None
    news = table.take_news()
    assert [(t.first_state, t.first_mask) for t in news.tables] == [(0, 0)]
    assert news.vocabulary is None and not table.leave(again)


def test_who_may_leave_the_tables_is_masked_by_the_host_in_stock_steps(table: Grammars) -> None:
    """A token in flight may lead outside, where a stock step would sample without a mask."""
    table.known["whole", STOPS], table.known["cut", STOPS] = automaton(3), automaton(3, cut=True)
    requests = {"1": request("1", "whole"), "2": request("2", "cut")}
    for each in requests.values():
        assert table.enter(each) is None
    one, both = (SimpleNamespace(num_scheduled_tokens=names) for names in (["1"], ["1", "2"]))
    assert table.are_on_device(one, requests, window=False)
    assert table.are_on_device(both, requests, window=True)
    assert not table.are_on_device(both, requests, window=False)
    requests["2"].output_token_ids += [3, 0]
    table.follow(requests["2"])
    assert table.reason(requests["2"]) == "structured output beyond its automaton"
    assert not table.are_on_device(both, requests, window=True)


def test_beside_drafts_nobody_is_on_the_device_who_may_leave_its_tables(table: Grammars) -> None:
    """A round would go on with a draft that leads outside."""
    table.drafts = True
    table.known["whole", STOPS], table.known["cut", STOPS] = automaton(3), automaton(3, cut=True)
    outside = "structured output beyond its automaton"
    assert table.enter(request("1", "whole")) is None
    assert table.enter(request("2", "cut")) == outside
    assert table.take_news().rows.keys() == {"1"}, "the device has no say in the other's drafts"


def test_a_thought_ends_with_its_token(table: Grammars) -> None:
    table.known["g", STOPS] = automaton(5)
    thinks = request("1", "g", (0, 0))
    table.enter(request("0", "g"))
    followed = table._followed(thinks)
    assert not isinstance(followed, str)
    table.requests["1"] = followed
    followed.ends = ReasoningEnds(2, 1)
    table.enter(thinks)
    assert table.take_news().rows["1"] == (REASONS, 2, 1)
    thinks.output_token_ids += [2, 3, 0]
    table.follow(thinks)
    assert followed.state == 3
    followed.begin()
    followed.follow([0, 1])
    assert followed.state == OUTSIDE


class Outside:
    """Stands in for Grammars; the requests of ``ids`` have left their tables."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.requests: dict[str, Any] = {}
        self.take_news = grammar_tables.GrammarNews

    def reason(self, request: Any) -> str | None:
        return "outside" if request.request_id in self.ids else None


def test_a_row_without_a_token_gets_its_reservation_back() -> None:
    """It has left its tables in the window before; the others have their tokens."""
    trace = Trace((Spec((5, 6), 1000, 30), Spec((7, 8, 9), 1000, 30)), max_model_len=400)
    scheduler: Any = make_scheduler(trace, FusedStepScheduler, "4")
    for number in (0, 1):
        scheduler.add_request(make_request(trace, number))

    def turn(*tokens: list[int], output: Any = None) -> Any:
        output = output or scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        index = {name: n for n, name in enumerate(ids)}
        result = ModelRunnerOutput(
            req_ids=ids, req_id_to_index=index, sampled_token_ids=list(tokens)
        )
        scheduler.update_from_output(output, result)
        return output

    turn([11], [12])
    other = scheduler.requests["1"]
    scheduler.grammars = outside = Outside()
    before = other.num_computed_tokens, other.num_output_placeholders
    output = scheduler.schedule()  # before the host knows
    outside.ids.add("1")
    turn([11, 12, 13, 14], [], output=output)
    assert set(output.num_scheduled_tokens.values()) == {4}
    assert (other.num_computed_tokens, other.num_output_placeholders) == before
    assert list(scheduler.requests["0"].output_token_ids) == [11, 11, 12, 13, 14]
