"""Decode cost per step: stock vLLM and fusedstep side by side, alternating."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusedstep.bench.adapters import Adapter
from fusedstep.bench.engine import Engine, Kind
from fusedstep.bench.environment import describe
from fusedstep.bench.images import ImagePrompt
from fusedstep.bench.progress import NO_PROGRESS, Progress
from fusedstep.bench.spread import Spread
from fusedstep.bench.wanted import Wanted
from fusedstep.errors import ConfigError
from fusedstep.options import Options
from fusedstep.vllm_plugin.launch import early, wiring

KINDS: tuple[Kind, ...] = ("stock", "fusedstep")
# Sampling fields on which a measurement depends.
CHOSEN = {"n", "temperature", "max_tokens", "min_tokens", "ignore_eos", "detokenize"}


@dataclass(frozen=True)
class Plan:
    """Settings of a measurement. Lengths in tokens."""

    batch_sizes: tuple[int, ...]
    temperatures: tuple[float, ...]
    input_len: int
    output_len: int
    repeats: int
    sampling: dict[str, Any]  # vLLM's SamplingParams names, beside temperature
    detokenize: bool
    images: tuple[Path, ...] = ()  # one in each prompt, in turn, beside its tokens
    adapters: tuple[Adapter, ...] = ()  # that requests take in turn, and none

    @property
    def lengths(self) -> dict[str, int]:
        """Share of the model's context that a request takes, by option."""
        return {"--input-len": self.input_len, "--output-len": self.output_len}

    def check(self, model: str, vllm_args: tuple[str, ...]) -> None:
        """Raises ConfigError for what no engine needs to be started for."""
        for name in self.sampling.keys() & CHOSEN:
            raise ConfigError(f"--sampling: {name} is chosen by bench latency: leave it out")
        early.check_lengths(model, vllm_args, self.lengths)
        early.check_batch(vllm_args, max(self.batch_sizes))

    @property
    def short_len(self) -> int:
        """The shorter of the two output lengths whose difference is measured."""
        return max(self.output_len // 4, 1)


@dataclass(frozen=True)
class Row:
    """One engine at one batch size and temperature."""

    engine: Kind
    batch_size: int
    temperature: float
    ms_per_step: Spread
    tokens_per_s: float
    idle_share: float  # share of a decode step in which no forward ran
    same_tokens: bool  # greedy outputs equal to stock's (True when it samples)
    repeats_ms: tuple[float, ...]  # ms per step of each repeat


@dataclass(frozen=True)
class Result:
    env: dict[str, Any]
    rows: list[Row]
    peak_rss_mib: dict[str, float]  # per engine, of its worker process

    def pairs(self) -> Iterator[tuple[Row, Row]]:
        """Stock's row and ours, per point."""
        yield from zip(self.rows[::2], self.rows[1::2], strict=True)

    def as_dict(self) -> dict[str, Any]:
        return {
            "env": self.env,
            "rows": [asdict(row) for row in self.rows],
            "ratios": [
                {
                    "batch_size": stock.batch_size,
                    "temperature": stock.temperature,
                    "speedup": stock.ms_per_step.p50 / ours.ms_per_step.p50
                    if ours.same_tokens
                    else None,  # no speed-up of different outputs
                }
                for stock, ours in self.pairs()
            ],
            "peak_rss_mib": self.peak_rss_mib,
        }


def measure(
    model: str,
    plan: Plan,
    options: Options,
    vllm_args: tuple[str, ...],
    progress: Progress = NO_PROGRESS,
) -> Result:
    """ms per step = (t(long) - t(short)) / (long - short): prefill and constant costs cancel.

    Both engines stay alive; the one that waits is stopped. Each repeat measures stock, then ours.
    """
    wiring.check(options)
    plan.check(model, vllm_args)
    with ExitStack() as stack:
        engines: dict[Kind, Engine] = {}
        wanted = Wanted(
            plan.lengths,
            max(plan.batch_sizes),
            images=bool(plan.images),
            adapters=plan.adapters,
        )
        for kind in KINDS:
            progress.say(f"{kind}: starting the engine")
            engines[kind] = stack.enter_context(Engine(kind, model, options, vllm_args, wanted))
            engines[kind].stop_clock()
        rows: list[Row] = []
        env = describe(model, options, vllm_args)
        for temperature in plan.temperatures:
            for batch_size in plan.batch_sizes:
                rows += _point(engines, plan, batch_size, temperature, progress.say)
                progress.keep(Result(env, rows, {}).as_dict())
        peak: dict[str, float] = {}
        for kind, engine in engines.items():
            engine.go_on()
            peak[kind] = engine.call("rpc", method="peak_rss_bytes") / (1 << 20)
            if kind == "fusedstep":  # what ran, where "auto" was asked for
                stats = engine.call("rpc", method="window_stats")
                env |= {name: stats[name] for name in ("ops", "loop") if name in stats}
            engine.stop_clock()
        return Result(env, rows, peak)


def _point(
    engines: dict[Kind, Engine],
    plan: Plan,
    batch_size: int,
    temperature: float,
    say: Callable[[str], None],
) -> list[Row]:
    """All repeats of one batch size and temperature, engines alternating."""
    steps = plan.output_len - plan.short_len
    seconds: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    idle_share: dict[Kind, float] = {}
    tokens: dict[Kind, Any] = {}
    for repeat in range(plan.repeats + 1):
        turn = f"repeat {repeat} of {plan.repeats}" if repeat else "warming up"
        say(f"batch {batch_size}, temperature {temperature:g}: {turn}")
        for kind in KINDS:
            engine = engines[kind]
            engine.go_on()
            if repeat == 0:  # warm up, then watch the forwards, which costs a little
                _generate(engine, plan, batch_size, temperature, plan.short_len, -1)
                engine.call("rpc", method="watch_forwards")
            short = _generate(engine, plan, batch_size, temperature, plan.short_len, repeat)
            long = _generate(engine, plan, batch_size, temperature, plan.output_len, repeat)
            if repeat == 0:
                idle_share[kind] = 1 - (long.in_forward - short.in_forward) / (
                    long.seconds - short.seconds
                )
                engine.call("rpc", method="look_away")
            else:
                seconds[kind].append((long.seconds - short.seconds) / steps)
            engine.stop_clock()
            tokens[kind] = long.tokens
    same = temperature > 0 or tokens["stock"] == tokens["fusedstep"]
    rows = []
    for kind in KINDS:
        repeats_ms = [1e3 * s for s in seconds[kind]]
        spread = Spread.of(repeats_ms)
        rows.append(
            Row(
                engine=kind,
                batch_size=batch_size,
                temperature=temperature,
                ms_per_step=spread,
                tokens_per_s=1e3 * batch_size / spread.p50,
                idle_share=idle_share[kind],
                same_tokens=same,
                repeats_ms=tuple(repeats_ms),
            )
        )
    return rows


@dataclass(frozen=True)
class _Run:
    seconds: float
    in_forward: float
    tokens: list[tuple[int, ...]]


def _generate(
    engine: Engine, plan: Plan, batch_size: int, temperature: float, output_len: int, repeat: int
) -> _Run:
    """One timed call of ``generate`` with random prompts (the same for both engines)."""
    rng = random.Random(f"{batch_size}/{repeat}/{output_len}")
    vocab_size = engine.call("vocab_size")
    random_ids = [
        [rng.randrange(vocab_size) for _ in range(plan.input_len)] for _ in range(batch_size)
    ]
    prompts: list[Any] = [{"prompt_token_ids": token_ids} for token_ids in random_ids]
    if plan.images:
        in_turn = itertools.cycle(plan.images)
        prompts = [ImagePrompt(ids, image) for ids, image in zip(random_ids, in_turn, strict=False)]
    params = {
        "temperature": temperature,
        "max_tokens": output_len,
        "min_tokens": 0,
        "ignore_eos": True,
        "detokenize": plan.detokenize,
        **(plan.sampling if temperature > 0 else {}),
    }
    before = engine.call("rpc", method="seconds_in_forward")
    seconds, tokens = engine.call(
        "generate", prompts=prompts, params=[params] * batch_size, timing=True
    )
    after = engine.call("rpc", method="seconds_in_forward")
    return _Run(seconds, after - before, tokens)
