"""Results of ``vllm bench serve``, parsed; rows per server and load, and their ratios."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from fusedstep.bench.server import Kind
from fusedstep.errors import FusedStepError

# Events of a stream that were read from the socket at once lie this close together (the tool
# takes the time after it has parsed each); no two decode steps do, over HTTP.
TOGETHER_MS = 0.1


@dataclass(frozen=True)
class Spread:
    """A figure: its median over the repeats, and the extremes."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Quantiles:
    """The 50th and 99th percentile of a run, each as its spread over the repeats. Milliseconds."""

    p50: Spread
    p99: Spread


@dataclass(frozen=True)
class Request:
    """One request of a run, as a client saw it; without an answer ``ttft_ms`` is None."""

    start_s: float  # of the tool's clock
    ttft_ms: float | None
    e2el_ms: float
    output_tokens: int
    repeat: int = 0
    text: str | None = None  # None: the tool has not kept it

    @property
    def tpot_ms(self) -> float | None:
        """Time per token but the first; None where there are no others."""
        if self.ttft_ms is None or self.output_tokens < 2:
            return None
        return (self.e2el_ms - self.ttft_ms) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Run:
    """One run of the tool. Times are (p50, p99) in milliseconds; see ``Row``."""

    ttft_ms: tuple[float, float]
    tpot_ms: tuple[float, float]
    itl_ms: tuple[float, float]
    chunk_ms: tuple[float, float]
    e2el_ms: tuple[float, float]
    output_tokens_per_s: float
    requests_per_s: float
    tokens_per_chunk: float
    output_tokens: int
    failed: int
    requests: tuple[Request, ...] = ()
    accepted_drafts: float | None = None  # share; None without speculative decoding

    @classmethod
    def parse(cls, result: dict[str, Any]) -> Run:
        """From the tool's detailed JSON, with percentiles 50 and 99 of ttft, tpot, itl and e2el.

        Chunks are derived: the tool lists the times between the events of each stream, and events
        that were read from the socket together count as one chunk.

        Raises:
            FusedStepError: a field is missing: this vLLM writes another JSON.
        """
        try:
            gaps = [
                chunk_gaps_ms(seconds)
                for seconds, error in zip(result["itls"], result["errors"], strict=True)
                if not error
            ]
            pooled = [gap for request in gaps for gap in request]
            percent = result.get("spec_decode_acceptance_rate")
            times = {
                name: (float(result[f"p50_{name}_ms"]), float(result[f"p99_{name}_ms"]))
                for name in ("ttft", "tpot", "itl", "e2el")
            }
            return cls(
                ttft_ms=times["ttft"],
                tpot_ms=times["tpot"],
                itl_ms=times["itl"],
                chunk_ms=(_percentile(pooled, 50), _percentile(pooled, 99)),
                e2el_ms=times["e2el"],
                output_tokens_per_s=float(result["output_throughput"]),
                requests_per_s=float(result["request_throughput"]),
                tokens_per_chunk=result["total_output_tokens"] / max(len(pooled) + len(gaps), 1),
                output_tokens=int(result["total_output_tokens"]),
                failed=int(result["failed"]),
                requests=tuple(_requests(result)),
                accepted_drafts=None if percent is None else float(percent) / 100,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FusedStepError(
                f"vllm bench serve wrote a JSON that we do not know ({error!r}): "
                "this vLLM is not supported by bench serve"
            ) from None


def _requests(result: dict[str, Any]) -> Iterator[Request]:
    names = ("start_times", "ttfts", "latencies", "output_lens", "errors")
    texts = result.get("generated_texts") or [None] * len(result["errors"])
    columns = (*(result[n] for n in names), texts)
    for start, ttft, latency, tokens, error, text in zip(*columns, strict=True):
        yield Request(start, None if error else 1e3 * ttft, 1e3 * latency, tokens, text=text)


def chunk_gaps_ms(gaps: list[float]) -> list[float]:
    """Milliseconds between the chunks of one stream, of seconds between its events."""
    found = []
    since_chunk = 0.0
    for gap in gaps:
        since_chunk += 1e3 * gap
        if 1e3 * gap > TOGETHER_MS:
            found.append(since_chunk)
            since_chunk = 0.0
    return found


def _percentile(values: list[float], percent: float) -> float:
    """numpy's, as the tool's; 0 of nothing."""
    return float(np.percentile(values or [0.0], percent))


@dataclass(frozen=True)
class Row:
    """One server under one load. ``failed`` counts requests of all repeats."""

    engine: Kind
    rate: float  # requests per second; math.inf: all at once
    concurrency: float  # requests in flight at most; math.inf: no bound
    ttft_ms: Quantiles  # from sending a request to its first chunk
    tpot_ms: Quantiles  # of a request: from its first chunk to its last, per token but the first
    itl_ms: Quantiles  # vLLM's: between two events of a stream, however many tokens they carry
    chunk_ms: Quantiles  # the same, events that arrived together being one
    e2el_ms: Quantiles  # from sending a request to its last chunk
    output_tokens_per_s: Spread
    requests_per_s: Spread
    tokens_per_chunk: Spread
    output_tokens: tuple[int, ...]  # per repeat
    failed: int
    requests: tuple[Request, ...] = ()  # of all repeats; not in JSON
    accepted_drafts: tuple[float | None, ...] = ()  # share, per repeat

    @classmethod
    def of(cls, engine: Kind, rate: float, concurrency: float, runs: list[Run]) -> Row:
        """The repeats of one server under one load."""

        def spread(name: str) -> Spread:
            return Spread.of([getattr(run, name) for run in runs])

        def quantiles(name: str) -> Quantiles:
            p50, p99 = zip(*(getattr(run, name) for run in runs), strict=True)
            return Quantiles(Spread.of(list(p50)), Spread.of(list(p99)))

        return cls(
            engine=engine,
            rate=rate,
            concurrency=concurrency,
            ttft_ms=quantiles("ttft_ms"),
            tpot_ms=quantiles("tpot_ms"),
            itl_ms=quantiles("itl_ms"),
            chunk_ms=quantiles("chunk_ms"),
            e2el_ms=quantiles("e2el_ms"),
            output_tokens_per_s=spread("output_tokens_per_s"),
            requests_per_s=spread("requests_per_s"),
            tokens_per_chunk=spread("tokens_per_chunk"),
            output_tokens=tuple(run.output_tokens for run in runs),
            failed=sum(run.failed for run in runs),
            requests=tuple(
                replace(one, repeat=n) for n, run in enumerate(runs) for one in run.requests
            ),
            accepted_drafts=tuple(run.accepted_drafts for run in runs),
        )

    def figures(self) -> Iterator[tuple[str, str, Spread]]:
        """Every figure: its name, "p50" or "p99" ("" where it is no quantile), its spread."""
        for name, value in vars(self).items():
            if isinstance(value, Quantiles):
                yield name, "p50", value.p50
                yield name, "p99", value.p99
            elif isinstance(value, Spread):
                yield name, "", value

    def as_dict(self) -> dict[str, Any]:
        """The medians, and under ``spread`` each one's extremes."""
        return {
            "engine": self.engine,
            **_load(self),
            **_nested((n, q, value.median) for n, q, value in self.figures()),
            "output_tokens": self.output_tokens,
            "failed": self.failed,
            "accepted_drafts": self.accepted_drafts,
            "spread": _nested((n, q, (value.min, value.max)) for n, q, value in self.figures()),
        }


EXACT = ("float32", "float")  # values of --dtype in which no answer may differ


@dataclass(frozen=True)
class Result:
    env: dict[str, Any]
    rows: list[Row]  # per load: stock's, then ours
    same_work: bool  # requests have a fixed length: both engines must give as many tokens

    def pairs(self) -> Iterator[tuple[Row, Row]]:
        """Stock's row and ours, per load."""
        yield from zip(self.rows[::2], self.rows[1::2], strict=True)

    def why_no_ratio(self, stock: Row, ours: Row) -> str | None:
        """In words; None where the two rows can be compared."""
        if stock.failed or ours.failed:
            return f"{stock.failed} and {ours.failed} failed"
        if self.same_work and stock.output_tokens != ours.output_tokens:
            return "numbers of tokens differ"
        same, of = self.same_texts(stock, ours) or (0, 0)
        if same < of and (same == 0 or self.env.get("dtype") in EXACT):
            return f"{of - same} of {of} texts differ"
        return None

    def same_texts(self, stock: Row, ours: Row) -> tuple[int, int] | None:
        """Requests with the same answer, of how many; None where answers are drawn, or not known.

        In bfloat16 a near-tie may fall to either side: other requests shared its batch.
        """
        texts = [(a.text, b.text) for a, b in zip(stock.requests, ours.requests, strict=False)]
        if self.env.get("temperature") != 0 or not texts or any(a is None for a, _ in texts):
            return None
        return sum(a == b for a, b in texts), len(texts)

    def ratios(self, stock: Row, ours: Row) -> Iterator[tuple[str, str, float | None]]:
        """Ours / stock of every figure's median; None where they cannot be compared."""
        comparable = self.why_no_ratio(stock, ours) is None
        for (name, quantile, a), (_, _, b) in zip(stock.figures(), ours.figures(), strict=True):
            found = b.median / a.median if comparable and a.median else None
            yield name, quantile, found

    def as_dict(self) -> dict[str, Any]:
        return {
            "env": self.env,
            "rows": [row.as_dict() for row in self.rows],
            "ratios": [
                {
                    **_load(stock),
                    **_nested(self.ratios(stock, ours)),
                    "why_none": self.why_no_ratio(stock, ours),
                    "same_texts": self.same_texts(stock, ours),
                }
                for stock, ours in self.pairs()
            ],
        }

    @property
    def comparable(self) -> bool:
        """Nothing failed, and both engines did the same."""
        return all(self.why_no_ratio(stock, ours) is None for stock, ours in self.pairs())


def number_or_inf(value: float) -> float | str:
    """JSON has no infinity; whole numbers are written as such."""
    if math.isinf(value):
        return "inf"
    return int(value) if value == int(value) else value


def _load(row: Row) -> dict[str, Any]:
    return {"rate": number_or_inf(row.rate), "concurrency": number_or_inf(row.concurrency)}


def _nested(figures: Iterator[tuple[str, str, Any]]) -> dict[str, Any]:
    """{"ttft_ms": {"p50": ...}, "output_tokens_per_s": ...}."""
    nested: dict[str, Any] = {}
    for name, quantile, value in figures:
        if quantile:
            nested.setdefault(name, {})[quantile] = value
        else:
            nested[name] = value
    return nested
