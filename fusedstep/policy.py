"""How many decode steps may the next window have, and why: pure functions, no vLLM, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fusedstep.errors import ConfigError

# Longest window; the static output buffers are this long.
MAX_STEPS = 64
# While somebody waits for a window's end and the time of a step is not known.
MAX_STEPS_UNTIMED = 8
# A slow step's time over the average; somebody who waits should in 99 of 100 windows be in time.
SLOW_STEP = 1.2
# Stop strings are seen by the host only, so a window may overrun one by its length.
MAX_STEPS_HOST_STOPS = 8


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
    """What the scheduler sees when a turn begins."""

    # Tokens that each request which decodes can still take, in-flight ones taken off; all >= 1.
    remaining: Sequence[int]
    prefill_in_flight: bool = False  # a running request still has prompt tokens to compute
    may_admit: bool = False  # a waiting request may join in this turn
    full_house: bool = False  # requests wait, and none can join before another stops
    # Was one turned away because of blocks that are held ahead, then for how many tokens ahead.
    tokens_ahead: int | None = None
    joins_anytime: bool = False  # a waiting request gets ready at a time that nobody announces
    stoppable: bool = True  # an arrival ends a window that runs
    stock_reason: str | None = None  # why the device cannot decode this batch
    streams: bool = False
    host_stops: bool = False  # only the host sees where a request stops: stop strings
    latency_ms: float = 50.0  # how much longer than for a stock step somebody may wait
    step_ms: float | None = None  # time of a step, None before any was measured
    step_measured: bool = True  # at this batch size, not only at another
    token_budget: int = 1 << 30  # tokens that windows may reserve
    free_blocks: int = 1 << 30  # KV-cache blocks that are free
    blocks_for: Callable[[int], int] = no_blocks  # at most these are taken by so many steps


@dataclass(frozen=True)
class Decision:
    """``num_steps`` of the coming window, and the reason in words.

    ``ends_at_stop``: somebody waits for a place, so the window ends at the first row that stops.
    """

    num_steps: int
    reason: str
    ends_at_stop: bool = False


def decide(config: DecodeSteps, turn: Turn) -> Decision:
    """The longest window that every limit allows; the reason names the limit that bound it."""
    if config.fixed == 1:
        return Decision(1, "fixed at 1")
    if turn.stock_reason is not None:
        return Decision(1, turn.stock_reason)
    if not turn.remaining:
        return Decision(1, "nothing decodes")
    if turn.prefill_in_flight:
        return Decision(1, "a prefill is in flight")
    if turn.may_admit or turn.tokens_ahead == 0:
        return Decision(1, "a waiting request may be admitted")

    limits = [
        (config.fixed or MAX_STEPS, "fixed" if config.fixed else "longest window"),
        (max(turn.remaining), "longest-remaining request"),
        (turn.token_budget // len(turn.remaining), "token budget"),
    ]
    if turn.tokens_ahead is not None:
        limits.append((turn.tokens_ahead // 4, "blocks held ahead are used first"))
    if config.fixed is None:
        limits += _waiting_limits(turn)
        if turn.host_stops:
            limits.append((MAX_STEPS_HOST_STOPS, "a request has stop strings"))
    num_steps, reason = min(limits, key=lambda limit: limit[0])
    num_steps = max(num_steps, 1)
    fitting = _fitting(turn, num_steps)
    if fitting < num_steps:
        num_steps, reason = fitting, "free KV-cache blocks"
    return Decision(num_steps, reason, ends_at_stop=turn.full_house)


def _waiting_limits(turn: Turn) -> list[tuple[int, str]]:
    """Limits for the sake of those who wait until the window is over.

    A stock step makes them wait, too: num_steps slow steps may take ``latency_ms`` more than one.
    """
    reasons = (
        (turn.streams, "a request streams"),
        (turn.joins_anytime, "a waiting request may get ready"),
        (not turn.stoppable, "the window cannot be ended"),
    )
    num_steps = MAX_STEPS
    if turn.step_ms is not None and turn.step_ms * MAX_STEPS > turn.latency_ms:
        num_steps = int((turn.latency_ms + turn.step_ms) / (SLOW_STEP * turn.step_ms))
    if turn.step_ms is None or not turn.step_measured:
        num_steps = min(num_steps, MAX_STEPS_UNTIMED)
    return [(num_steps, words) for applies, words in reasons if applies]


def _fitting(turn: Turn, num_steps: int) -> int:
    """The most steps up to ``num_steps``, at least 1, whose blocks may be taken.

    Half of what is free stays for who comes next.
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

    def get(self, batch_size: int) -> tuple[float | None, bool]:
        """The average and True; until this size was measured the longest of all, and False."""
        ms = self._ms.get(batch_size.bit_length())
        if ms is not None:
            return ms, True
        return max(self._ms.values(), default=None), False
