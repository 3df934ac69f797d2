"""A grammar's automaton: built from xgrammar's rules, its masks xgrammar's, every state compared.

Why equal states have equal masks: xgrammar's matcher (an Earley parser) keeps, for the bytes so
far, all ways to go on in the rules, and a token is in its mask if its bytes keep one of them alive.
A state of ours is exactly that set of ways, whatever bytes led to it. ``build`` holds each state to
it: xgrammar's mask there must be the tokens whose bytes the table leads on.

Some masks of xgrammar's leave out a token that its matcher would take: for each place in a rule it
notes beforehand which tokens cannot come, and judges what may follow the rule by an estimate. Such
a mask too depends on the places in the rules, the state, and on nothing else.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusedstep.grammar.entries import OUTSIDE
from fusedstep.grammar.left_recursion import without_left_recursion
from fusedstep.grammar.rules import NoAutomaton, Rules, parse, read_rules
from fusedstep.grammar.subsets import FEW, MANY, determinise
from fusedstep.grammar.vocabulary import Vocabulary
from fusedstep.grammar.walks import (
    AMBIGUOUS,
    LESS,
    MORE,
    SAME,
    STOP,
    compare,
    row_starts,
    walk,
)

if TYPE_CHECKING:
    import xgrammar

Ints = npt.NDArray[np.int32]

_WAYS = 4  # to a state, on which a mask that is not exact is tried again
_WRONG = {
    MORE: "xgrammar lets token {} through after {!r}, the table does not",
    STOP: "xgrammar and the table do not agree on the stop token {} after {!r}",
    AMBIGUOUS: "token {} may end the grammar or go on after {!r}",
}


@dataclass(frozen=True)
class Limits:
    """How large an automaton may become. What is beyond is OUTSIDE: a stock step's."""

    states: int = 4096
    mask_bytes: int = 64 << 20
    work: int = 4_000_000  # configurations looked at: bounds the time, and does not vary with it
    seconds: float = 5.0  # a machine that is busy may need them


@dataclass(frozen=True)
class Automaton:
    """The tables of a grammar. State 0 is the start."""

    next_states: Ints  # [num_states, 256], by byte; NOWHERE, OUTSIDE
    mask_ids: Ints  # [num_states], rows of masks
    masks: Ints  # [num_masks, words]: xgrammar's, bit t % 32 of word t // 32 is token t

    @property
    def num_states(self) -> int:
        """The number of states."""
        return len(self.next_states)

    @property
    def nbytes(self) -> int:
        """The bytes of all tables."""
        return self.next_states.nbytes + self.mask_ids.nbytes + self.masks.nbytes

    @property
    def cut(self) -> bool:
        """True if a limit was met: some bytes lead OUTSIDE."""
        return bool((self.next_states == OUTSIDE).any())

    def after(self, vocabulary: Vocabulary, token_ids: Iterable[int], state: int = 0) -> int:
        """The state after these tokens: >= 0, ENDED (a stop token has come) or OUTSIDE."""
        tokens = np.fromiter(token_ids, np.int32)
        return int(walk(self.next_states, state, vocabulary.offsets, vocabulary.data, tokens))


def build(
    compiled: xgrammar.CompiledGrammar,
    stop_token_ids: Iterable[int],
    vocabulary: Vocabulary,
    limits: Limits | None = None,
) -> Automaton:
    """The automaton of a compiled grammar, proved against xgrammar.

    ``stop_token_ids``: those of the request; none means the tokenizer's. Raises NoAutomaton.
    """
    limits = limits or Limits()
    warm()
    deadline = time.monotonic() + limits.seconds
    states = _determinise(without_left_recursion(read_rules(compiled)), limits)
    table = states.table
    if not len(table):
        raise NoAutomaton("the grammar begins with rules that call each other (left recursion)")
    masks = _Masks(compiled, sorted(set(stop_token_ids)), vocabulary, states, limits.mask_bytes)
    mask_ids = masks.of_states(deadline)
    if len(mask_ids) < len(table):  # cut where the masks end
        table = table[: len(mask_ids)].copy()
        table[table >= len(table)] = OUTSIDE
    return Automaton(table, np.array(mask_ids, np.int32), np.stack(masks.rows))


@functools.cache
def warm() -> None:
    """Compiles the kernels, or loads them from numba's cache, so that no build's time goes there.

    ``build`` does it too; an engine may want it at its start.
    """
    rules = parse(
        "Rule 0: root, FSM: CompactFSM(num_states=2, start=0, end=[1], edges=[\n"
        "0: ['a'->1]\n1: []\n])\n"
    )
    vocabulary = Vocabulary.from_bytes([b"a", b""])
    states = _determinise(rules, Limits(states=2))
    mask, stops = np.array([1], np.int32), np.array([1], np.int32)
    found, _ = _Walks(states.table, vocabulary, stops).compare(0, False, mask)
    after = Automaton(states.table, np.zeros(2, np.int32), mask[None]).after(vocabulary, [0])
    if found != SAME or after != 1:
        raise NoAutomaton("the kernels of fusedstep.grammar do not work on this machine")


@dataclass(frozen=True)
class _States:
    """States without masks; each with the state and the byte that it was first found by."""

    table: Ints
    accepts: npt.NDArray[np.bool_]
    parents: Ints
    via: npt.NDArray[np.uint8]

    def text_before(self, state: int) -> bytes:
        """The fewest bytes that lead to a state."""
        text = b""
        while state > 0:
            text = bytes([self.via[state]]) + text
            state = int(self.parents[state])
        return text


def _determinise(rules: Rules, limits: Limits) -> _States:
    for room in (FEW, MANY):
        *tables, full = determinise(
            rules.first_edges,
            rules.edges,
            rules.starts,
            rules.accepting,
            rules.repeats,
            rules.root,
            limits.states,
            limits.work,
            room,
        )
        if not full:
            break
    return _States(*tables)


class _Walks:
    """All tokens of a vocabulary walked through a table, and the memory for it."""

    def __init__(self, table: Ints, vocabulary: Vocabulary, stops: Ints) -> None:
        self._table = table
        self._rows = row_starts(table)
        tree = vocabulary.tree
        words = len(tree.level_node) // 32
        self._tree = (tree.depth, tree.byte, tree.after, tree.tokens, tree.ends, tree.order)
        self._levels = (tree.level_parent, tree.level_byte, tree.level_node)
        self._vocabulary = vocabulary
        self._stops = stops
        self._space = (
            np.empty(1 + tree.depth.max(initial=0), np.uint32),
            np.empty(len(tree.level_parent), np.uint32),
            np.empty(words, np.uint32),
            np.empty(words, np.uint32),
        )

    def compare(self, state: int, accept: bool, mask: Ints) -> tuple[int, int]:
        """See walks.compare."""
        found, token = compare(
            self._table,
            self._rows,
            state,
            accept,
            self._tree,
            self._levels,
            self._vocabulary.offsets,
            self._vocabulary.data,
            self._stops,
            mask,
            self._space,
        )
        return int(found), int(token)

    def less(self) -> list[int]:
        """The tokens that the last mask leaves out, though the table lets them through."""
        words = self._space[2]
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return [int(token) for token in np.flatnonzero(bits)]


class _Masks:
    """xgrammar's masks of an automaton's states: taken, compared, each kept once."""

    def __init__(
        self,
        compiled: xgrammar.CompiledGrammar,
        stop_token_ids: list[int],
        vocabulary: Vocabulary,
        states: _States,
        max_bytes: int,
    ) -> None:
        import xgrammar

        if compiled.tokenizer_info.vocab_size != vocabulary.size:
            raise ValueError("the grammar was compiled for another vocabulary")
        self._new_matcher = functools.partial(
            xgrammar.GrammarMatcher, compiled, override_stop_tokens=stop_token_ids or None
        )
        self._matcher = self._new_matcher()
        stops = np.array(self._matcher.stop_token_ids, np.int32)
        self._walks = _Walks(states.table, vocabulary, stops)
        self._states = states
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocabulary.size)
        self._row: Ints = self._bitmask.numpy()[0]
        self._ids: dict[bytes, int] = {}
        self._max_masks = max(1, max_bytes // self._row.nbytes)
        self.rows: list[Ints] = []

    def of_states(self, deadline: float) -> list[int]:
        """Each state's mask id, for as many states from the start on as the limits allow.

        A state's matcher is its parent's after one more byte; parents are numbered in order.
        """
        states = self._states
        mask_ids: list[int] = []
        numbers = np.arange(len(states.table) + 1)
        children = np.searchsorted(states.parents, numbers).tolist()
        matchers: dict[int, xgrammar.GrammarMatcher] = {0: self._matcher}
        for state in range(len(states.table)):
            matcher = matchers.pop(state)
            matcher.fill_next_token_bitmask(self._bitmask)
            accept = bool(states.accepts[state])
            found, token = self._walks.compare(state, accept, self._row)
            mask_id = self._keep()
            if found == LESS:
                self._check_less(state, matcher)
            elif found != SAME:
                raise NoAutomaton(_WRONG[found].format(token, states.text_before(state)))
            if mask_id < 0 or (mask_ids and time.monotonic() > deadline):
                break
            mask_ids.append(mask_id)
            for child in range(children[state], children[state + 1]):
                matchers[child] = matcher.fork()
                if not matchers[child].accept_string(bytes([states.via[child]])):
                    raise NoAutomaton(f"xgrammar refuses {states.text_before(child)!r}")
        return mask_ids

    def _check_less(self, state: int, matcher: xgrammar.GrammarMatcher) -> None:
        """Checks a mask that leaves tokens out which the table lets through.

        xgrammar's masks are not exact where a rule's lookahead is an estimate. So the table is
        right if xgrammar's own matcher takes these tokens. The mask still is the state's: it comes
        of its configurations alone. That is tried on other ways to the state.
        """
        states = self._states
        for token in self._walks.less():
            if not matcher.accept_token(token):
                text = states.text_before(state)
                raise NoAutomaton(f"xgrammar refuses token {token} after {text!r}")
            matcher.rollback()
        mask = self._row.tobytes()
        ways = np.argwhere(states.table == state)
        first = (int(states.parents[state]), int(states.via[state]))
        others = [way for way in map(tuple, ways.tolist()) if way != first]
        for parent, byte in others[:: len(others) // _WAYS + 1]:
            text = states.text_before(parent) + bytes([byte])
            other = self._new_matcher()
            if not other.accept_string(text):
                raise NoAutomaton(f"xgrammar refuses {text!r}")
            other.fill_next_token_bitmask(self._bitmask)
            if self._row.tobytes() != mask:
                raise NoAutomaton(f"xgrammar's mask after {text!r} is another than on other ways")

    def _keep(self) -> int:
        """The id of the mask in the row; -1 if it is new and there is no room for it."""
        key = self._row.tobytes()
        mask_id = self._ids.get(key)
        if mask_id is None:
            if len(self.rows) == self._max_masks:
                return -1
            mask_id = self._ids[key] = len(self.rows)
            self.rows.append(self._row.copy())
        return mask_id
