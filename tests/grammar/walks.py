"""Random walks of tokens: an automaton beside a matcher of xgrammar's that sees the same tokens."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import numpy.typing as npt
import xgrammar

from fusedstep.grammar import ENDED, OUTSIDE, Automaton, Vocabulary


class Differs(AssertionError):
    """The automaton and xgrammar are not of one mind."""


def bits(mask: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.uint8]:
    """A mask as one number for each token."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:size]


class Walker:
    """Walks of one grammar over one vocabulary."""

    def __init__(
        self, compiled: xgrammar.CompiledGrammar, vocabulary: Vocabulary, stops: list[int]
    ) -> None:
        self._compiled, self._vocabulary, self._stops = compiled, vocabulary, stops
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocabulary.size)
        lengths = np.diff(vocabulary.offsets)
        firsts = np.full(vocabulary.size, 256, np.int32)
        firsts[lengths > 0] = vocabulary.data[vocabulary.offsets[:-1][lengths > 0]]
        self._order = np.lexsort((lengths, firsts))
        self._firsts = firsts[self._order]
        self.visits: Counter[int] = Counter()

    def compare(self, automaton: Automaton, seed: int, steps: int) -> None:
        """Compares the masks on one walk. Raises Differs."""
        random, greed = Random(seed), (1.0, 0.8, 0.5)[seed % 3]
        matcher = xgrammar.GrammarMatcher(self._compiled, override_stop_tokens=self._stops or None)
        state = 0
        for _ in range(steps):
            self.visits[state] += 1
            matcher.fill_next_token_bitmask(self._bitmask)
            theirs = bits(self._bitmask.numpy()[0], self._vocabulary.size)
            ours = bits(automaton.masks[automaton.mask_ids[state]], self._vocabulary.size)
            if (theirs != ours).any():
                raise Differs(f"state {state}: {np.flatnonzero(theirs != ours)[:5]}")
            if not theirs.any():
                break
            token = self._choose(automaton, state, theirs, random, greed)
            if not matcher.accept_token(token):
                raise Differs(f"state {state}: xgrammar refuses its own token {token}")
            state = automaton.after(self._vocabulary, [token], state)
            if (state == ENDED) != matcher.is_terminated():
                raise Differs(f"token {token} leads to {state}, terminated at another time")
            if state in (ENDED, OUTSIDE):
                break

    def _choose(
        self,
        automaton: Automaton,
        state: int,
        mask: npt.NDArray[np.uint8],
        random: Random,
        greed: float,
    ) -> int:
        """A token; a greedy walk takes the shortest ones that lead to states seldom visited."""
        places = np.flatnonzero(mask[self._order])
        starts = np.flatnonzero(np.diff(self._firsts[places], prepend=-1))
        firsts = self._firsts[places[starts]]
        chosen = random.randrange(len(starts))
        if random.random() < greed:
            row = np.append(automaton.next_states[state], ENDED)
            seen = [self.visits[after] if after >= 0 else 1 << 30 for after in row[firsts].tolist()]
            chosen = min(range(len(seen)), key=lambda i: (seen[i], random.random()))
        end = starts[chosen + 1] if chosen + 1 < len(starts) else len(places)
        place = starts[chosen]
        if random.random() > greed:
            place = random.randrange(place, end)
        return int(self._order[places[place]])
