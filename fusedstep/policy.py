"""How many decode steps may the next window have, and why: pure functions, no vLLM, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fusedstep.errors import ConfigError
from fusedstep.reasons import Reason

# Longest window; the static output buffers are this long.
MAX_STEPS = 64
# Limit while a request waits for the window's end and the time of a step is not known.
MAX_STEPS_UNTIMED = 8
# Slow steps take up to this times the average: 99 of 100 windows stay within the latency.
SLOW_STEP = 1.2
# Stop strings are seen by the host only, so a window may overrun one by its length.
MAX_STEPS_HOST_STOPS = 8
# What it costs to end a window before its last step: the host's turn, with nothing behind it.
TURN_MS = 10.0
# In so many steps all rows of a batch have stopped, if nothing else is known.
STOPS_WITHIN = 128
# Logprobs of a window, 12 bytes each, which the device and the host keep room for, twice.
MAX_LOGPROBS = 1 << 22


@dataclass(frozen=True)
class DecodeSteps:
    """The configured window length: a fixed number, or None for ``auto``."""

    fixed: int | None = None

    @classmethod
    def parse(cls, value: object, name: str = "decode_steps") -> DecodeSteps:
        """``auto`` or an integer from 1 to MAX_STEPS; else a ConfigError on ``name``."""
        text = str(value).strip().lower()
        if text == "auto":
            return cls()
        if not text.isdecimal() or not 1 <= int(text) <= MAX_STEPS:
            raise ConfigError(
                f"{name} must be 'auto' or a number from 1 to {MAX_STEPS}, not {value!r}"
            )
        return cls(int(text))

    def __str__(self) -> str:
        return "auto" if self.fixed is None else str(self.fixed)


def no_blocks(num_steps: int) -> int:
    """Windows of any length take no KV-cache block."""
    return 0


@dataclass(frozen=True)
class Turn:
    """The scheduler's view when a turn begins."""

    # Steps that each request which decodes can still take, in-flight ones taken off; all >= 1.
    remaining: Sequence[int]
    prefill_in_flight: bool = False  # a running request still has prompt tokens to compute
    may_admit: bool = False  # a waiting request may join in this turn
    full_house: bool = False  # requests wait, and none can join before another stops
    # If a request was refused only because of blocks held ahead: how many tokens ahead they reach.
    tokens_ahead: int | None = None
    joins_anytime: bool = False  # a waiting request gets ready without an announcement
    stoppable: bool = True  # an arrival ends a window that runs
    stock_reason: str | None = None  # why the device cannot decode this batch
    streams: bool = False
    host_stops: bool = False  # only the host sees where a request stops: stop strings
    latency_ms: float = 50.0  # how much longer than a stock step a window may keep those who wait
    step_ms: float | None = None  # time of a step, None before any was measured
    step_measured: bool = True  # at this batch size, not only at another
    row_ms: float = 0.0  # that a row more adds to a step; 0 where it is not known
    token_budget: int = 1 << 30  # tokens that windows may reserve
    logprobs: int = 0  # of a step, of all requests together
    free_blocks: int = 1 << 30  # KV-cache blocks that are free
    blocks_for: Callable[[int], int] = no_blocks  # at most these are taken by so many steps
    state_block: int = 1 << 30  # tokens of a block of recurrent state: vLLM adds one per turn
    # A step is a speculative round: it reserves so many tokens, its drafts and one more.
    tokens_per_step: int = 1
    room: int = 1 << 30  # tokens that every request may reserve


@dataclass(frozen=True)
class Decision:
    """``num_steps`` of the coming window, and the reason in words.

    ``num_stops``: it ends when about so many rows have stopped: 1 where a request waits for a row,
    more where a smaller batch is faster; 0: when no row is left.
    """

    num_steps: int
    reason: str
    num_stops: int = 0


def decide(config: DecodeSteps, turn: Turn) -> Decision:
    """The longest window that every limit allows; the reason names the limit that bound it."""
    if config.fixed == 1:
        return Decision(1, Reason.FIXED_AT_1)
    if turn.stock_reason is not None:
        return Decision(1, turn.stock_reason)
    if not turn.remaining:
        return Decision(1, Reason.NOTHING_DECODES)
    if turn.prefill_in_flight:
        return Decision(1, Reason.PREFILL)
    if turn.may_admit or turn.tokens_ahead == 0:
        return Decision(1, Reason.MAY_ADMIT)

    tokens = [
        (config.fixed or MAX_STEPS, Reason.FIXED if config.fixed else Reason.LONGEST),
        (turn.token_budget // len(turn.remaining), Reason.TOKEN_BUDGET),
        (turn.state_block, Reason.STATE_BLOCK),
        (turn.room, Reason.MAX_MODEL_LEN),
    ]
    if turn.logprobs:
        tokens.append((MAX_LOGPROBS // turn.logprobs, Reason.LOGPROBS))
    if turn.tokens_ahead is not None:
        tokens.append((turn.tokens_ahead // 4, Reason.HELD_AHEAD))
    if config.fixed is None and turn.host_stops:
        tokens.append((MAX_STEPS_HOST_STOPS, Reason.STOP_STRINGS))
    limits = [(max(turn.remaining), Reason.REMAINING)]
    limits += [(limit // turn.tokens_per_step, reason) for limit, reason in tokens]
    if config.fixed is None:
        limits += _waiting_limits(turn)
    num_steps, reason = min(limits, key=lambda limit: limit[0])
    num_steps = max(num_steps, 1)
    fitting = _fitting(turn, num_steps)
    if fitting < num_steps:
        num_steps, reason = fitting, Reason.BLOCKS
    return Decision(num_steps, reason, 1 if turn.full_house else _stops(turn, num_steps))


def _stops(turn: Turn, num_steps: int) -> int:
    """Rows that may stop before the window ends for the sake of those that go on; 0: all.

    A row that has stopped costs each step ``row_ms``, and an end costs ``TURN_MS``. Let stops come
    evenly, those of all rows within ``STOPS_WITHIN`` steps. Then s rows have cost
    s^2 / 2 * STOPS_WITHIN / num_rows * row_ms when the last of them stops. A stop costs least where
    that equals ``TURN_MS``.
    """
    num_rows = len(turn.remaining)
    if not turn.row_ms or num_steps == 1:
        return 0
    stops = (2 * TURN_MS * num_rows / (STOPS_WITHIN * turn.row_ms)) ** 0.5
    return max(round(stops), 1) if stops <= num_rows / 2 else 0


def _waiting_limits(turn: Turn) -> list[tuple[int, Reason]]:
    """Limits that keep the wait for the window's end short.

    A stock step makes them wait, too: num_steps slow steps may take ``latency_ms`` more than one.
    """
    reasons = (
        (turn.streams, Reason.STREAMS),
        (turn.joins_anytime, Reason.JOINS_ANYTIME),
        (not turn.stoppable, Reason.CANNOT_END),
    )
    num_steps = MAX_STEPS
    if turn.step_ms is not None and turn.step_ms * MAX_STEPS > turn.latency_ms:
        num_steps = int((turn.latency_ms + turn.step_ms) / (SLOW_STEP * turn.step_ms))
    if turn.step_ms is None or not turn.step_measured:
        num_steps = min(num_steps, MAX_STEPS_UNTIMED)
    return [(num_steps, words) for applies, words in reasons if applies]


def _fitting(turn: Turn, num_steps: int) -> int:
    """The most steps up to ``num_steps``, at least 1, whose blocks may be taken.

    Half of the free blocks stays for the next request.
    """
    allowed = turn.free_blocks // 2
    if turn.blocks_for(num_steps) <= allowed:
        return num_steps
    fits, too_many = 1, num_steps
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if turn.blocks_for(middle) <= allowed:
            fits = middle
        else:
            too_many = middle
    return fits


class StepTimes:
    """Time of a decode step in ms, by power-of-two batch size: an exponential moving average.

    One slow step (a compilation, a pause of the machine) at most doubles it, and is soon forgotten.
    """

    def __init__(self) -> None:
        self._ms: dict[int, float] = {}

    def add(self, batch_size: int, num_steps: int, ms: float) -> None:
        """``num_steps`` steps of a batch took ``ms`` from completion to completion."""
        size, sample = batch_size.bit_length(), ms / num_steps
        average = self._ms.get(size, sample)
        self._ms[size] = average + (min(sample, 2 * average) - average) / 4

    def row_ms(self, batch_size: int) -> float:
        """Time that one row more adds to a step of a batch of this size, by the next smaller size
        that was measured; 0 where none was."""
        sizes = [size for size in self._ms if size < batch_size.bit_length()]
        here = self._ms.get(batch_size.bit_length())
        if here is None or not sizes:
            return 0.0
        smaller = max(sizes)
        rows = 0.75 * ((1 << batch_size.bit_length()) - (1 << smaller))  # of their middles
        return max(here - self._ms[smaller], 0.0) / rows

    def get(self, batch_size: int) -> tuple[float | None, bool]:
        """The average and True; until this size was measured the longest of all, and False."""
        ms = self._ms.get(batch_size.bit_length())
        if ms is not None:
            return ms, True
        return max(self._ms.values(), default=None), False
