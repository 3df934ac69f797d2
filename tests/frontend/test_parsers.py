"""Windows through unfolding and every streaming parser that vLLM ships: as one token at a time."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
from frontend.formats import CANNOT, FIND_NOTHING, NEED_SINGLE_TOKENS, REASONING, TOOLS
from frontend.stream import one_by_one, parse, parser_cls, tokens
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

NAMES = [
    *(f"tool:{name}" for name in ToolParserManager.list_registered()),
    *(f"reasoning:{name}" for name in ReasoningParserManager.list_registered()),
]
ALL_UP_TO = 8  # tokens of which every partition is tried
Windows = list[list[int]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Some parsers log a traceback for every text that is not complete yet."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def cut(ids: list[int], ends: tuple[int, ...]) -> Windows:
    return [ids[begin:end] for begin, end in pairwise((0, *ends, len(ids)))]


def partitions(ids: list[int]) -> Iterator[Windows]:
    """Even ones, random ones, and all of the last tokens, where a call or the thoughts end."""
    for size in (2, 3, 5, 8, len(ids)):
        yield cut(ids, tuple(range(size, len(ids), size)))
    chosen = random.Random(len(ids))
    for _ in range(6):
        places = range(1, len(ids))
        yield cut(ids, tuple(sorted(chosen.sample(places, chosen.randint(1, len(ids) // 2)))))
    begin = max(len(ids) - ALL_UP_TO, 0)
    head = tuple(range(1, begin + 1))
    for count in range(0, ALL_UP_TO, 2):
        for ends in combinations(range(begin + 1, len(ids)), count):
            yield cut(ids, (*head, *ends))


def test_every_parser_has_a_text_or_a_reason() -> None:
    texts = {f"tool:{name}" for name in TOOLS} | {f"reasoning:{name}" for name in REASONING}
    assert texts | set(CANNOT) == set(NAMES)
    assert not texts & set(CANNOT)


@pytest.mark.parametrize("name", CANNOT)
def test_parser_that_cannot_be_made_says_why(name: str) -> None:
    with pytest.raises((ImportError, TypeError), match=CANNOT[name]):
        parser_cls(name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CANNOT])
def test_text_is_in_the_parsers_format(name: str) -> None:
    whole = one_by_one(name)[1]
    found = whole["calls"] if name.startswith("tool:") else whole["reasoning"] and whole["content"]
    assert bool(found) == (name not in FIND_NOTHING), whole


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CANNOT])
def test_no_parser_can_tell_a_window_from_single_tokens(name: str) -> None:
    for windows in partitions(tokens(name)):
        assert parse(name, windows, ours=True) == one_by_one(name), windows


@pytest.mark.parametrize("name", NEED_SINGLE_TOKENS)
def test_parser_loses_text_of_a_window_that_is_not_unfolded(name: str) -> None:
    """The control: without unfolding some partition gives another text."""

    def differs(windows: Windows) -> bool:
        try:
            return parse(name, windows, ours=False)[1] != one_by_one(name)[1]
        except Exception:
            return True

    assert any(differs(windows) for windows in partitions(tokens(name)))
