"""How many decode steps may the next window have, and why: pure functions, no vLLM, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusedstep.errors import ConfigError

# Longest window; the static output buffers are this long.
MAX_STEPS = 64
# While a running request streams, tokens reach its client once per window: keep bursts short.
MAX_STEPS_STREAMING = 8
# Stop strings are seen by the host only, so a window may overrun one by its length.
MAX_STEPS_STOP_STRINGS = 8


@dataclass(frozen=True)
class DecodeSteps:
    """The configured window length: a fixed number, or None for ``auto``."""

    fixed: int | None = None

    @classmethod
    def parse(cls, value: object) -> DecodeSteps:
        """``auto`` or an integer from 1 to MAX_STEPS; anything else raises ConfigError."""
        text = str(value).strip().lower()
        if text == "auto":
            return cls()
        if not text.isdecimal() or not 1 <= int(text) <= MAX_STEPS:
            raise ConfigError(
                f"decode steps must be 'auto' or a number from 1 to {MAX_STEPS}, not {value!r}"
            )
        return cls(int(text))

    def __str__(self) -> str:
        return "auto" if self.fixed is None else str(self.fixed)


@dataclass(frozen=True)
class DecodingRequest:
    """One running request that decodes in the coming turn. Units: tokens."""

    remaining: int  # tokens it can still take, in-flight ones taken off
    num_computed_tokens: int  # including in-flight reservations


@dataclass(frozen=True)
class Turn:
    """What the scheduler sees when a turn begins."""

    decoding: Sequence[DecodingRequest]
    prefill_in_flight: bool = False  # a running request still has prompt tokens to compute
    admissible: bool = False  # a waiting request could be admitted in this turn
    stock_reason: str | None = None  # why the device cannot decode this batch
    streams: bool = False
    stop_strings: bool = False
    token_budget: int = 1 << 30  # tokens this turn may schedule
    free_blocks: int = 1 << 30  # KV-cache blocks that are free
    block_size: int = 1 << 30  # tokens per KV-cache block


@dataclass(frozen=True)
class Decision:
    """``num_steps`` of the coming window, and the reason in words."""

    num_steps: int
    reason: str


def decide(config: DecodeSteps, turn: Turn) -> Decision:
    """The longest window that every limit allows; the reason names the limit that bound it."""
    if config.fixed == 1:
        return Decision(1, "fixed at 1")
    if turn.stock_reason is not None:
        return Decision(1, turn.stock_reason)
    if not turn.decoding:
        return Decision(1, "nothing decodes")
    if turn.prefill_in_flight:
        return Decision(1, "a prefill is in flight")
    if turn.admissible:
        return Decision(1, "a waiting request can be admitted")

    limits = [
        (config.fixed or MAX_STEPS, "fixed" if config.fixed else "longest window"),
        (max(r.remaining for r in turn.decoding), "longest-remaining request"),
        (turn.token_budget // len(turn.decoding), "token budget"),
    ]
    if turn.streams and config.fixed is None:
        limits.append((MAX_STEPS_STREAMING, "a request streams"))
    if turn.stop_strings and config.fixed is None:
        limits.append((MAX_STEPS_STOP_STRINGS, "a request has stop strings"))
    num_steps, reason = min(limits, key=lambda limit: limit[0])
    while num_steps > 1 and _blocks_needed(turn, num_steps) > turn.free_blocks:
        num_steps, reason = num_steps // 2, "free KV-cache blocks"
    return Decision(max(num_steps, 1), reason)


def _blocks_needed(turn: Turn, num_steps: int) -> int:
    """KV-cache blocks that a reservation of ``num_steps`` tokens per request adds."""
    block_size = turn.block_size
    return sum(
        -(-(r.num_computed_tokens + min(num_steps, r.remaining)) // block_size)
        + (-r.num_computed_tokens // block_size)
        for r in turn.decoding
    )
