"""Structured output in the engine core: the grammars that the device has, and each request's state.

vLLM's own matcher stays the authority: it follows a window's tokens in ``update_from_output`` and
fails a request whose token it refuses. What the device has not, it masks as in stock vLLM.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from vllm.parser.engine.adapters import ParserEngineReasoningAdapter
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from fusedstep.grammar import Automaton, Limits, NoAutomaton, Vocabulary, build, warm
from fusedstep.ops.types import FREE, OUTSIDE, REASONS
from fusedstep.reasons import Reason
from fusedstep.vllm_plugin import grammar_tables
from fusedstep.vllm_plugin.grammar_tables import GrammarNews, RowGrammar, Table

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.reasoning import ReasoningParser
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

logger = logging.getLogger("vllm.fusedstep")

# Automata that are kept for the next request with the same grammar.
MOST_KNOWN = 256

Key = tuple[Any, frozenset[int]]  # the grammar, the stop tokens of its request


class ReasoningEnds(NamedTuple):
    """The token that ends a request's reasoning, and one that is the first after it; -1: none."""

    end: int = -1
    begin: int = -1


@dataclass
class Share:
    """A grammar's place in the device's tables."""

    first_state: int
    first_mask: int
    automaton: Automaton
    users: set[str] = field(default_factory=set)  # request ids


@dataclass
class Followed:
    """A request whose grammar the device has."""

    share: Share
    ends: ReasoningEnds | None  # None: it began with its grammar
    vocabulary: Vocabulary
    state: int = FREE  # after the tokens that the host knows, in the automaton's own numbers
    num_tokens: int = 0  # of its output, that are known

    @cached_property
    def may_leave(self) -> bool:
        return self.leaves(self.share.automaton, self.ends)

    @staticmethod
    def leaves(automaton: Automaton, ends: ReasoningEnds | None) -> bool:
        """Can a token lead out of the tables?"""
        return automaton.cut or (ends is not None and ends.begin >= 0)

    def begin(self) -> None:
        """Before its first token."""
        self.state, self.num_tokens = (0 if self.ends is None else REASONS), 0

    def follow(self, new: list[int]) -> None:
        """The host knows more of its tokens."""
        self.num_tokens += len(new)
        for n, token in enumerate(new):
            if self.state > REASONS:
                self.state = self.share.automaton.after(self.vocabulary, new[n:], self.state)
                return
            if self.ends is not None and token == self.ends.begin:
                self.state = OUTSIDE
            elif self.ends is not None and token == self.ends.end:
                self.state = REASONS - self.state

    @property
    def device_state(self) -> int:
        """In the numbers of the device's tables."""
        first = self.share.first_state
        if self.state >= 0:
            return self.state + first
        return self.state - first if self.state <= REASONS else self.state


class Grammars:
    """One per scheduler. Grammars are compiled in vLLM's threads, the rest is the main thread's."""

    def __init__(self, manager: StructuredOutputManager, vllm_config: VllmConfig) -> None:
        self.manager, self.model = manager, vllm_config.model_config
        self.drafts = vllm_config.speculative_config is not None
        vocab_size = self.model.get_vocab_size()
        self.max_masks = grammar_tables.max_masks(vocab_size)
        self.known: OrderedDict[Key, Automaton | str] = OrderedDict()  # or why there is none
        self.shares: OrderedDict[Key, Share] = OrderedDict()  # least recently used first
        self.requests: dict[str, Followed] = {}
        self.news = GrammarNews()
        self.vocabulary: Vocabulary | None = None
        self._is_sent = False  # the vocabulary, to the workers
        self._lock = threading.Lock()
        self._stock_create = manager._create_grammar
        manager._create_grammar = self._create_grammar
        warm()

    def _create_grammar(self, request: Request) -> Any:
        """A thread of vLLM's: its own grammar, and then the automaton of it."""
        grammar = self._stock_create(request)
        key = _key(request)
        if key not in self.known:
            self.known[key] = self._build(grammar, key[1])
        return grammar

    def _build(self, grammar: Any, stop_token_ids: frozenset[int]) -> Automaton | str:
        if not isinstance(grammar, XgrammarGrammar):
            return f"{Reason.STRUCTURED_OUTPUT} by {type(grammar).__name__}"
        try:
            with self._lock:
                if self.vocabulary is None:
                    tokenizer, stops = grammar.ctx.tokenizer_info, self._stops_of_all()
                    self.vocabulary = Vocabulary.of(tokenizer, stops)
            limits = Limits(
                states=grammar_tables.MAX_STATES // 4,
                mask_bytes=grammar_tables.MASK_BYTES // 4,
            )
            return build(grammar.ctx, stop_token_ids, self.vocabulary, limits)
        except NoAutomaton as error:
            return f"{Reason.STRUCTURED_OUTPUT}: {error}"
        except Exception:
            logger.exception("fusedstep: no automaton for a grammar, which stock steps mask")
            return f"{Reason.STRUCTURED_OUTPUT}: no automaton"

    def _stops_of_all(self) -> list[int]:
        """The stop tokens of every request: those of the model's generation config."""
        ends = self.model.try_get_generation_config().get("eos_token_id", ())
        return [ends] if isinstance(ends, int) else list(ends or ())

    def enter(self, request: Request) -> str | None:
        """A request is scheduled for the first time, or again from its prompt on.

        Returns the reason that its grammar is not on the device, or None.
        """
        followed = self.requests.get(request.request_id)
        if followed is None:
            found = self._followed(request)
            if isinstance(found, str):
                return found
            followed = self.requests[request.request_id] = found
        followed.begin()
        self.follow(request)
        ends = followed.ends or ReasoningEnds()
        self.news.rows[request.request_id] = RowGrammar(followed.device_state, *ends)
        return self.reason(request)

    def follow(self, request: Request) -> None:
        """The host knows more of a request's tokens."""
        followed = self.requests.get(request.request_id)
        if followed is not None:
            followed.follow(request.output_token_ids[followed.num_tokens :])

    def reason(self, request: Request) -> str | None:
        """The reason that the host must say what may come next, or None."""
        followed = self.requests.get(request.request_id)
        return Reason.OUTSIDE if followed is not None and followed.state == OUTSIDE else None

    def leave(self, request: Request) -> bool:
        """A request has ended. Was its grammar on the device?"""
        followed = self.requests.pop(request.request_id, None)
        if followed is not None:
            followed.share.users.discard(request.request_id)
        return followed is not None

    def take_news(self) -> GrammarNews:
        """All that the workers do not know yet."""
        news, self.news = self.news, GrammarNews()
        if news.rows and not self._is_sent:
            assert self.vocabulary is not None
            self._is_sent = True
            starts, data = self.vocabulary.offsets, self.vocabulary.data
            news = replace(news, vocabulary=grammar_tables.Vocabulary(starts, data.copy()))
        return news

    def are_on_device(
        self, output: SchedulerOutput, requests: dict[str, Request], *, window: bool
    ) -> bool:
        """Can the device mask for all requests of this batch that have a grammar?

        A token in flight may lead one out of its tables. A window ends its row then; a stock step
        would sample for it all the same, without a mask.
        """
        scheduled = [requests[request_id] for request_id in output.num_scheduled_tokens]
        return all(
            self._is_on_device(request, window)
            for request in scheduled
            if request.use_structured_output and not request.is_prefill_chunk
        )

    def _is_on_device(self, request: Request, window: bool) -> bool:
        followed = self.requests.get(request.request_id)
        if followed is None or followed.state == OUTSIDE:
            return False
        return window or not followed.may_leave

    def _followed(self, request: Request) -> Followed | str:
        """With a place in the tables, or the reason that there is none."""
        if request.resumable:
            return f"{Reason.STRUCTURED_OUTPUT} of a streamed input"
        automaton = self.known.get(_key(request))
        if automaton is None:
            return f"{Reason.STRUCTURED_OUTPUT}: not compiled"
        self.known.move_to_end(_key(request))
        while len(self.known) > MOST_KNOWN:
            self.known.popitem(last=False)
        if isinstance(automaton, str):
            return automaton
        assert self.vocabulary is not None
        if len(self.vocabulary.data) > grammar_tables.BYTES_PER_TOKEN * self.vocabulary.size:
            return f"{Reason.STRUCTURED_OUTPUT}: the tokens are too long"
        ends: ReasoningEnds | None = None
        if self.manager._get_constraint_bounds(request, ()).constraint_start > 0:
            ends = reasoning_ends(self.manager._get_reasoner(request))
            if ends is None:
                return f"{Reason.STRUCTURED_OUTPUT} after reasoning"
        if self.drafts and Followed.leaves(automaton, ends):
            return Reason.OUTSIDE  # a round would go on with a draft that leads there
        share = self._place(_key(request), automaton)
        if share is None:
            return f"{Reason.STRUCTURED_OUTPUT}: its tables are full"
        share.users.add(request.request_id)
        return Followed(share, ends, self.vocabulary)

    def _place(self, key: Key, automaton: Automaton) -> Share | None:
        """The grammar's place in the device's tables; others that nobody uses make way."""
        share = self.shares.get(key)
        if share is not None:
            self.shares.move_to_end(key)
            return share
        num_states, num_masks = len(automaton.mask_ids), len(automaton.masks)
        while True:
            shares = self.shares.values()
            state = first_fit(
                num_states,
                [(s.first_state, len(s.automaton.mask_ids)) for s in shares],
                grammar_tables.MAX_STATES,
            )
            mask = first_fit(
                num_masks,
                [(s.first_mask, len(s.automaton.masks)) for s in shares],
                self.max_masks,
            )
            if state is not None and mask is not None:
                break
            idle = next((k for k, s in self.shares.items() if not s.users), None)
            if idle is None:
                return None
            del self.shares[idle]
        share = self.shares[key] = Share(state, mask, automaton)
        edges = automaton.next_states
        placed = np.where(edges >= 0, edges + state, edges)
        self.news.tables.append(
            Table(state, mask, placed, automaton.mask_ids + mask, automaton.masks)
        )
        return share


def first_fit(size: int, taken: list[tuple[int, int]], room: int) -> int | None:
    """The first start of ``size`` free places in a row; ``taken`` are (start, size)."""
    start = 0
    for begin, length in sorted(taken):
        if begin - start >= size:
            break
        start = begin + length
    return start if start + size <= room else None


def reasoning_ends(reasoner: ReasoningParser | None) -> ReasoningEnds | None:
    """How the reasoning of a request ends, where single tokens tell; else None."""
    if isinstance(reasoner, BaseThinkingReasoningParser):
        return _of_thinking(reasoner)
    if isinstance(reasoner, ParserEngineReasoningAdapter):
        return _of_engine(reasoner)
    return None


def _of_thinking(reasoner: BaseThinkingReasoningParser) -> ReasoningEnds | None:
    known = BaseThinkingReasoningParser.is_reasoning_end_streaming
    if type(reasoner).is_reasoning_end_streaming is not known:
        return None
    return ReasoningEnds(reasoner.end_token_id)


def _of_engine(reasoner: ParserEngineReasoningAdapter) -> ReasoningEnds | None:
    ends: dict[bool, list[int]] = {False: [], True: []}
    for token in reasoner.reasoning_end_token_ids:
        found = reasoner.find_reasoning_end([token])
        if found is None:
            return None
        ends[found.implicit].append(token)
    if len(ends[False]) != 1 or len(ends[True]) > 1:
        return None
    return ReasoningEnds(ends[False][0], *ends[True])


def _key(request: Request) -> Key:
    structured, params = request.structured_output_request, request.sampling_params
    assert structured is not None and params is not None
    return structured.structured_output_key, frozenset(params.all_stop_token_ids)
