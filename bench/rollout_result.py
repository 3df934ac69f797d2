"""Results of ``bench rollout``: what a run was, what the repeats say, whether outputs agree."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fusedstep.bench.engine import Kind
from fusedstep.bench.spread import Spread
from fusedstep.counts import WindowCounts

# Logprobs of the same tokens after the same tokens agree within this.
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
# Of 16-bit models: two engines that round differently may draw another token, of so many one.
TOKENS_PER_TIE = 200
THIN = 4  # a batch is thin when fewer than one in so many of its rows are active


@dataclass(frozen=True)
class Run:
    """One rollout of one engine."""

    seconds: float
    ended: tuple[float, ...]  # seconds after the start, per sample
    rows: int  # that can be active at a time
    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]  # of these tokens; empty where nobody asked
    counts: WindowCounts | None  # None: no windows

    @classmethod
    def of(cls, told: dict[str, Any], counts: Any, before: Any) -> Run:
        """From the engine's answer, and its counts after it and before it."""
        if counts is not None:
            then = WindowCounts() if before is None else WindowCounts.from_dict(before)
            counts = WindowCounts.from_dict(counts).since(then)
        return cls(**told, counts=counts)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tail_seconds(self) -> float:
        """Time at the end in which less than a quarter of the rows were active."""
        few = -(-self.rows // THIN) - 1  # the most that are less than a quarter
        return self.seconds - sorted(self.ended)[-few - 1] if few else 0.0


@dataclass(frozen=True)
class Row:
    """One engine's repeats."""

    engine: Kind
    tokens: int  # of all repeats
    tokens_per_s: Spread
    seconds: Spread
    tail_seconds: Spread
    tail_share: Spread  # of the time
    windows: int
    steps: int  # of windows
    unused_steps: int  # reserved for windows that ended before them
    idle_row_steps: int  # of windows, that rows sat out, having ended before
    one_step_turns: dict[str, int]  # by reason
    repeats_tokens_per_s: tuple[float, ...]

    @classmethod
    def of(cls, engine: Kind, runs: list[Run]) -> Row:
        rates = [run.num_tokens / run.seconds for run in runs]
        counts = [run.counts or WindowCounts() for run in runs]
        turns = sum((each.one_step_turns for each in counts), WindowCounts().one_step_turns)
        return cls(
            engine=engine,
            tokens=sum(run.num_tokens for run in runs),
            tokens_per_s=Spread.of(rates),
            seconds=Spread.of([run.seconds for run in runs]),
            tail_seconds=Spread.of([run.tail_seconds for run in runs]),
            tail_share=Spread.of([run.tail_seconds / run.seconds for run in runs]),
            windows=sum(each.windows for each in counts),
            steps=sum(each.steps for each in counts),
            unused_steps=sum(each.unused_steps for each in counts),
            idle_row_steps=sum(each.idle_row_steps for each in counts),
            one_step_turns=dict(turns),
            repeats_tokens_per_s=tuple(rates),
        )

    @property
    def unused_share(self) -> float:
        return self.unused_steps / max(self.steps + self.unused_steps, 1)

    @property
    def idle_share(self) -> float:
        """Of the steps of all rows: how many they sat out."""
        return self.idle_row_steps / max(self.tokens + self.idle_row_steps, 1)


@dataclass(frozen=True)
class Comparison:
    """Ours against stock's, sample by sample, up to the first token that differs."""

    oracle: Kind
    dtype: str
    samples: int
    same: int  # samples with the same tokens
    tokens: int  # that were compared
    first_difference: int | None  # the earliest in its sample
    logprob_gap: float | None  # the largest; None where nobody asked for logprobs
    logprob_tolerance: float

    @property
    def agrees(self) -> bool:
        ties = 0 if self.dtype == "float32" else self.tokens // TOKENS_PER_TIE
        return (
            self.samples - self.same <= ties and (self.logprob_gap or 0.0) <= self.logprob_tolerance
        )


def compare(want: Run, have: Run, oracle: Kind, dtype: str) -> Comparison:
    """The outputs of the same requests."""
    at: list[int] = []
    tokens, gap = 0, 0.0
    for index, (theirs, ours) in enumerate(zip(want.tokens, have.tokens, strict=True)):
        length = max(len(theirs), len(ours))
        pairs = enumerate(zip(theirs, ours, strict=False))
        first = next((n for n, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
        if first < length:
            at.append(first)
        tokens += min(first + 1, length)
        if want.logprobs:
            both = zip(want.logprobs[index][:first], have.logprobs[index][:first], strict=True)
            gap = max(gap, max((abs(a - b) for a, b in both), default=0.0))
    return Comparison(
        oracle=oracle,
        dtype=dtype,
        samples=len(want.tokens),
        same=len(want.tokens) - len(at),
        tokens=tokens,
        first_difference=min(at, default=None),
        logprob_gap=gap if want.logprobs else None,
        logprob_tolerance=LOGPROB_TOLERANCE.get(dtype, LOGPROB_TOLERANCE["bfloat16"]),
    )


@dataclass(frozen=True)
class Result:
    """Stock's row, ours, and whether both did the same."""

    env: dict[str, Any]
    rows: list[Row]
    comparison: Comparison

    @property
    def speedup(self) -> float | None:
        """None: no speed-up of different outputs."""
        stock, ours = self.rows
        if not self.comparison.agrees:
            return None
        return ours.tokens_per_s.p50 / stock.tokens_per_s.p50

    def as_dict(self) -> dict[str, Any]:
        return {
            "env": self.env,
            "rows": [
                asdict(row) | {"unused_share": row.unused_share, "idle_share": row.idle_share}
                for row in self.rows
            ],
            "comparison": asdict(self.comparison) | {"agrees": self.comparison.agrees},
            "speedup": self.speedup,
        }
