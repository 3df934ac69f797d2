"""The tables of grammars, as the scheduler places them and the workers hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fusedstep.ops.types import FREE

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

# Room for all grammars in use together.
MAX_STATES = 1 << 14
MASK_BYTES = 32 << 20
BYTES_PER_TOKEN = 16  # on average; no tokenizer that we know of comes near


def mask_words(vocab_size: int) -> int:
    """Words of 32 bits in a mask."""
    return -(-vocab_size // 32)


def max_masks(vocab_size: int) -> int:
    return MASK_BYTES // (4 * mask_words(vocab_size))


class Table(NamedTuple):
    """A grammar's share of the tables; its states and masks are numbered as they are there."""

    first_state: int
    first_mask: int
    next_states: np.ndarray  # [n, 256] int32
    mask_ids: np.ndarray  # [n] int32
    masks: np.ndarray  # [m, words] int32


class Vocabulary(NamedTuple):
    """Of the tokenizer."""

    token_starts: np.ndarray  # [V + 1] int32
    token_bytes: np.ndarray  # uint8


class RowGrammar(NamedTuple):
    """The beginning of a request that enters its row."""

    state: int = FREE
    reasoning_end: int = -1  # see GrammarState.reasoning_ends
    grammar_begin: int = -1


@dataclass
class GrammarNews:
    """From the scheduler to the workers: all that a turn's new requests bring."""

    vocabulary: Vocabulary | None = None  # once
    tables: list[Table] = field(default_factory=list)
    rows: dict[str, RowGrammar] = field(default_factory=dict)  # by request id


NO_NEWS = GrammarNews()


def bring_grammars(output: SchedulerOutput, news: GrammarNews) -> None:
    output.grammars = news


def grammars_of(output: SchedulerOutput) -> GrammarNews:
    return getattr(output, "grammars", NO_NEWS)
