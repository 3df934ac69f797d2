"""What ``build`` refuses and does not believe, where it cuts, how stop tokens end a grammar."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import xgrammar
from grammar.cases import CASES
from grammar.conftest import World
from grammar.walks import Walker, bits

from fusedstep.grammar import ENDED, NOWHERE, OUTSIDE, Limits, NoAutomaton, Vocabulary, build
from fusedstep.grammar import automaton as automaton_module
from fusedstep.grammar.rules import parse

BY_NAME = {case.name: case for case in CASES}


def _id(world: World, text: bytes) -> int:
    return int(world.info.decoded_vocab.index(text))


# What the device does with tokens


def test_a_token_that_ends_the_grammar(bundled: World) -> None:
    compiled = bundled.compiler.compile_grammar('root ::= "a" "b"?')
    automaton = build(compiled, [], bundled.vocabulary)
    a, b, end = _id(bundled, b"a"), _id(bundled, b"b"), bundled.info.stop_token_ids[0]
    after_a = automaton.after(bundled.vocabulary, [a])
    assert after_a > 0
    assert automaton.after(bundled.vocabulary, [b], after_a) > 0
    assert automaton.after(bundled.vocabulary, [end], after_a) == ENDED
    assert automaton.after(bundled.vocabulary, [a, end, b, b]) == ENDED
    allowed = [
        np.flatnonzero(bits(automaton.masks[automaton.mask_ids[state]], 49152)).tolist()
        for state in (0, after_a, automaton.after(bundled.vocabulary, [a, b]))
    ]
    assert allowed == [sorted([a, _id(bundled, b"ab")]), sorted([b, end]), [end]]


def test_multi_byte_characters_across_tokens(fallback: World) -> None:
    compiled = fallback.compiler.compile_grammar('root ::= "日本" | "日時"')
    automaton = build(compiled, [], fallback.vocabulary)
    whole = [_id(fallback, text.encode()) for text in "日本"]
    pieces = [_id(fallback, bytes([byte])) for byte in "日本".encode()]
    ends = {
        automaton.after(fallback.vocabulary, tokens)
        for tokens in (whole, pieces, [whole[0], *pieces[3:]], [*pieces[:3], whole[1]])
    }
    assert len(ends) == 1 and ends.pop() > 0
    mid = automaton.after(fallback.vocabulary, pieces[:1])
    mask = bits(automaton.masks[automaton.mask_ids[mid]], fallback.vocabulary.size)
    assert np.flatnonzero(mask).tolist() == [pieces[1]]


def test_special_tokens_are_text_if_xgrammar_says_so(fallback: World) -> None:
    special = fallback.info.decoded_vocab.index(b"<|tool|>")
    padding = fallback.vocabulary.size - 1
    assert padding in fallback.info.special_token_ids
    compiled = fallback.compiler.compile_regex(r"(<\|tool\|>)+")
    automaton = build(compiled, [], fallback.vocabulary)
    start = bits(automaton.masks[automaton.mask_ids[0]], fallback.vocabulary.size)
    texts = [fallback.info.decoded_vocab[token] for token in np.flatnonzero(start)]
    assert set(texts) == {b"<|tool|>", b"<"} and start[special]
    pieces = [_id(fallback, bytes([byte])) for byte in b"<|tool|>"]
    after = automaton.after(fallback.vocabulary, [special])
    assert after == automaton.after(fallback.vocabulary, [*pieces, special, *pieces]) > 0
    masks = [bits(mask, fallback.vocabulary.size) for mask in automaton.masks]
    assert not any(mask[padding] for mask in masks)


def test_stop_tokens_of_the_request(bundled: World) -> None:
    """Ordinary text may end a grammar, where its bytes cannot go on."""
    compiled = bundled.compiler.compile_regex(r"[0-9]+")
    stops = [_id(bundled, b"."), 2]
    automaton = build(compiled, stops, bundled.vocabulary)
    walker = Walker(compiled, bundled.vocabulary, stops)
    for seed in range(10):
        walker.compare(automaton, seed, 20)
    digit = _id(bundled, b"7")
    assert automaton.after(bundled.vocabulary, [digit, digit]) >= 0
    assert automaton.after(bundled.vocabulary, [digit, stops[0]]) == ENDED
    mask = bits(automaton.masks[automaton.mask_ids[1]], 49152)
    assert mask[stops].all() and not mask[0]


def test_a_stop_token_whose_text_may_go_on_is_refused(bundled: World) -> None:
    compiled = bundled.compiler.compile_regex(r"[0-9]+")
    with pytest.raises(NoAutomaton, match="may end the grammar or go on"):
        build(compiled, [_id(bundled, b"7")], bundled.vocabulary)


def test_stop_tokens_of_every_request_are_never_text(bundled: World) -> None:
    """A generation config has more stop tokens than the tokenizer; to xgrammar they are text."""
    more = _id(bundled, b"<|endoftext|>")
    stops = [more, *bundled.info.stop_token_ids]
    compiled = BY_NAME["tag auto"].compile(bundled.compiler)
    with pytest.raises(NoAutomaton, match=f"token {more} may end the grammar or go on after b''"):
        build(compiled, stops, bundled.vocabulary)
    vocabulary = Vocabulary.of(bundled.info, stops)
    automaton = build(compiled, stops, vocabulary)
    walker = Walker(compiled, vocabulary, stops)
    for seed in range(6):
        walker.compare(automaton, seed, 40)
    assert automaton.after(vocabulary, [_id(bundled, b"the"), more]) == ENDED
    string = BY_NAME["string"].compile(bundled.compiler)
    with pytest.raises(NoAutomaton, match=f"lets token {more} through"):  # not this request's
        build(string, bundled.info.stop_token_ids, vocabulary)


def test_a_stop_token_is_no_text_before_the_end(bundled: World) -> None:
    """Its bytes fit in the middle, but xgrammar lets a stop token come at the end only."""
    compiled = bundled.compiler.compile_grammar('root ::= "x" "7" "x"')
    x, seven = _id(bundled, b"x"), _id(bundled, b"7")
    allowed = {
        stops: np.flatnonzero(bits(automaton.masks[automaton.mask_ids[state]], 49152)).tolist()
        for stops in ((), (seven,))
        for automaton in [build(compiled, stops, bundled.vocabulary)]
        for state in [automaton.after(bundled.vocabulary, [x])]
    }
    assert allowed == {(): [seven], (seven,): []}


# Limits


@pytest.mark.parametrize("states", [1, 2, 60, 333])
def test_cut_automata_agree_inside(bundled: World, states: int) -> None:
    compiled = BY_NAME["ten fields"].compile(bundled.compiler)
    whole = build(compiled, [], bundled.vocabulary)
    automaton = build(compiled, [], bundled.vocabulary, Limits(states=states))
    size = min(states, whole.num_states)
    assert automaton.num_states == size and automaton.cut == (size < whole.num_states)
    inside = np.where(whole.next_states[:size] >= size, OUTSIDE, whole.next_states[:size])
    assert (automaton.next_states == inside).all()
    same = automaton.masks[automaton.mask_ids] == whole.masks[whole.mask_ids[:size]]
    assert same.all()
    walker = Walker(compiled, bundled.vocabulary, [])
    for seed in range(3):
        walker.compare(automaton, seed, 30)


def test_the_limit_of_masks_and_of_work(bundled: World) -> None:
    compiled = BY_NAME["ten fields"].compile(bundled.compiler)
    whole = build(compiled, [], bundled.vocabulary)
    few = build(compiled, [], bundled.vocabulary, Limits(mask_bytes=10 * 49152 // 8))
    assert len(few.masks) == 10 and few.cut and few.nbytes < 10 * 49152 // 8 + 1100 * few.num_states
    lazy = build(compiled, [], bundled.vocabulary, Limits(work=100))
    assert 1 < lazy.num_states < whole.num_states and lazy.cut
    late = build(compiled, [], bundled.vocabulary, Limits(seconds=0.0))
    assert late.num_states == 1 and late.cut
    for automaton in (few, lazy, late):
        Walker(compiled, bundled.vocabulary, []).compare(automaton, 0, 30)


def test_left_recursion_past_the_start_is_outside(fallback: World) -> None:
    lark = 'start: "<" a ">"\na: b "+" | "x"\nb: a "-" | "y"\n'
    automaton = build(fallback.compiler.compile_lark(lark), [], fallback.vocabulary)
    assert automaton.num_states == 1 and automaton.next_states[0, ord("<")] == OUTSIDE


# Refusals


@pytest.mark.parametrize(
    ("lark", "reason"),
    [
        ('start: "x" word\nword[lazy]: /[a-z]+/\n', r"rule word has \[lazy\]"),
        ('start: "x" word\nword[max_tokens=5]: /[a-z]+/\n', r"\[max_tokens=5\]"),
        ('start: "x" word\nword[max_chars=5, capture="w"]: /[a-z]+/\n', r"max_chars=5"),
        ('start: "x" word\nword[stop="abc"]: /[a-z]+/\n', "lazy"),
        ('start: "x" <|im_end|> "y"\n', "an edge of the kind 'Token'"),
        ('start: a\na: b "x" | "y"\nb: a "z" | "w"\n', "left recursion"),
    ],
)
def test_refused(bundled: World, lark: str, reason: str) -> None:
    compiled = bundled.compiler.compile_lark(lark)
    with pytest.raises(NoAutomaton, match=reason):
        build(compiled, [], bundled.vocabulary)


def test_another_format_is_refused(bundled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = BY_NAME["integer"].compile(bundled.compiler)
    monkeypatch.setattr(xgrammar, "get_serialization_version", lambda: "v17")
    with pytest.raises(NoAutomaton, match="format is v17, known is v16"):
        build(compiled, [], bundled.vocabulary)


@pytest.mark.parametrize(
    ("edges", "reason"),
    [
        ("0: [EOS->1]\n1: []\n", "kind 'EOS'"),
        ("0: ['a'->1, What(3)->1]\n1: []\n", "kind 'What'"),
        ("0: ['a'->1; 'b'->1]\n1: []\n", "cannot be read"),
        ("0: ['\\q'->1]\n1: []\n", "character"),
        ("0: [Rule(7)->1]\n1: []\n", "names a rule or a state"),
        ("0: ['a'->9]\n1: []\n", "names a rule or a state"),
        ("0: [Repeat(rule=0, min=3, max=-1)->1]\n1: []\n", "a repetition from 3 to -1"),
    ],
)
def test_unknown_listings_are_refused(edges: str, reason: str) -> None:
    head = "Rule 0: root, FSM: CompactFSM(num_states=2, start=0, end=[1], edges=[\n"
    assert parse(head + "0: ['a'->1]\n1: []\n])\n").root == 0
    with pytest.raises(NoAutomaton, match=reason):
        parse(head + edges + "])\n")


def test_another_vocabulary_is_an_error(bundled: World, fallback: World) -> None:
    with pytest.raises(ValueError, match="another vocabulary"):
        build(BY_NAME["integer"].compile(bundled.compiler), [], fallback.vocabulary)


# What is made of the rules is not believed


def _with(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    real = automaton_module._determinise

    def changed(*arguments: Any) -> Any:
        states = real(*arguments)
        change(states.table, states.accepts, states.via)
        return states

    automaton_module.warm()
    monkeypatch.setattr(automaton_module, "_determinise", changed)


@pytest.mark.parametrize("state", [0, 5, 40])
def test_a_lost_edge_is_found(bundled: World, monkeypatch: pytest.MonkeyPatch, state: int) -> None:
    def change(table: Any, accepts: Any, via: Any) -> None:
        table[state, np.flatnonzero(table[state] >= 0)[0]] = NOWHERE

    _with(monkeypatch, change)
    with pytest.raises(NoAutomaton, match=r"lets token \d+ through after"):
        build(BY_NAME["weather"].compile(bundled.compiler), [], bundled.vocabulary)


def test_an_edge_too_many_is_found(bundled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(table: Any, accepts: Any, via: Any) -> None:
        table[3, ord("Q")] = 4

    _with(monkeypatch, change)
    with pytest.raises(NoAutomaton, match=f"xgrammar refuses token {_id(bundled, b'Q')} after"):
        build(BY_NAME["weather"].compile(bundled.compiler), [], bundled.vocabulary)


def test_a_wrong_end_is_found(bundled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(table: Any, accepts: Any, via: Any) -> None:
        accepts[7] = not accepts[7]

    _with(monkeypatch, change)
    with pytest.raises(NoAutomaton, match=r"stop token 2 after"):
        build(BY_NAME["weather"].compile(bundled.compiler), [], bundled.vocabulary)


def test_a_wrong_way_to_a_state_is_found(bundled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(table: Any, accepts: Any, via: Any) -> None:
        via[1] = ord("Q")

    _with(monkeypatch, change)
    with pytest.raises(NoAutomaton, match="xgrammar refuses b'Q'"):
        build(BY_NAME["weather"].compile(bundled.compiler), [], bundled.vocabulary)


# Threads


def test_builds_in_threads_do_not_meet(bundled: World) -> None:
    cases = [BY_NAME[name] for name in ("ten fields", "weather", "tag auto", "json object")] * 3
    compiled = [case.compile(bundled.compiler) for case in cases]
    limits = Limits(states=1000, seconds=60)
    alone = [build(grammar, [], bundled.vocabulary, limits) for grammar in compiled]
    with ThreadPoolExecutor(4) as pool:
        beside = pool.map(lambda grammar: build(grammar, [], bundled.vocabulary, limits), compiled)
    for one, other in zip(alone, beside, strict=True):
        assert (one.next_states == other.next_states).all()
        assert (one.mask_ids == other.mask_ids).all() and (one.masks == other.masks).all()


# The vocabulary


def test_a_vocabulary_of_152000_tokens() -> None:
    random = np.random.default_rng(0)
    texts = {bytes([byte]) for byte in range(256)}
    letters = np.frombuffer(b'abcdefgh XYZ0123456789"{}[]:,.\\\n\xc3\xa9\xe6\x97\xa5', np.uint8)
    while len(texts) < 151936:
        texts.update(
            letters[random.integers(0, len(letters), length)].tobytes()
            for length in random.integers(2, 12, 20000)
        )
    tokens = sorted(texts)[:151936]
    random.shuffle(tokens)  # type: ignore[arg-type]
    info = xgrammar.TokenizerInfo([*tokens, b"</s>"], stop_token_ids=[151936])
    vocabulary = Vocabulary.of(info)
    assert vocabulary.size == 151937
    compiled = BY_NAME["weather"].compile(xgrammar.GrammarCompiler(info))
    automaton = build(compiled, [], vocabulary)
    walker = Walker(compiled, vocabulary, [])
    for seed in range(3):
        walker.compare(automaton, seed, 30)
    assert automaton.masks.shape[1] == (151937 + 31) // 32
    assert automaton.after(vocabulary, [tokens.index(b"{")]) > 0
