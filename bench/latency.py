"""Decode cost per step: stock vLLM and fusedstep side by side, alternating."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fusedstep.bench.adapters import Adapter
from fusedstep.bench.engine import Engine, Kind
from fusedstep.bench.environment import describe
from fusedstep.bench.images import ImagePrompt
from fusedstep.bench.progress import NO_PROGRESS, Progress
from fusedstep.bench.prompts import Request
from fusedstep.bench.spread import Spread
from fusedstep.bench.wanted import Wanted
from fusedstep.errors import ConfigError
from fusedstep.options import Options
from fusedstep.vllm_plugin.launch import early, wiring

KINDS: tuple[Kind, ...] = ("stock", "fusedstep")
PLAIN = "fusedstep without drafts"
SPECULATION_OPTIONS = ("--spec", "-sc")
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
    prompts: tuple[Request, ...] = ()  # in the place of random tokens: each repeat runs them all
    without_drafts: bool = False  # also measure fusedstep without its drafter

    @property
    def lengths(self) -> dict[str, int]:
        """Share of the model's context that a request takes, by option."""
        of_prompts = {} if self.prompts else {"--input-len": self.input_len}
        return of_prompts | {"--output-len": self.output_len}

    def check(self, model: str, vllm_args: tuple[str, ...]) -> None:
        """Raises ConfigError for what no engine needs to be started for."""
        if self.prompts and self.images:
            raise ConfigError("--prompts and --images: a prompt with an image has random tokens")
        if self.without_drafts and vllm_args == drop_speculation(vllm_args):
            raise ConfigError("--without-drafts: there are none without --speculative-config")
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
    idle_share: float  # share of a decode step in which no forward of the target ran
    same_tokens: bool  # greedy outputs equal to stock's (True when it samples)
    repeats_ms: tuple[float, ...]  # ms per step of each repeat


@dataclass(frozen=True)
class Result:
    env: dict[str, Any]
    rows: list[Row]
    peak_rss_mib: dict[str, float]  # per engine, of its worker process
    plain: tuple[Row, ...] = ()  # fusedstep without drafts, per point

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
            "plain": [asdict(row) for row in self.plain],
        }


def drop_speculation(vllm_args: tuple[str, ...]) -> tuple[str, ...]:
    """The options of an engine that decodes without drafts."""
    kept: list[str] = []
    rest = iter(vllm_args)
    for arg in rest:
        name, equals, _ = arg.partition("=")
        if not name.replace("_", "-").startswith(SPECULATION_OPTIONS):
            kept.append(arg)
        elif not equals:
            next(rest, None)
    return tuple(kept)


def measure(
    model: str,
    plan: Plan,
    options: Options,
    vllm_args: tuple[str, ...],
    progress: Progress = NO_PROGRESS,
) -> Result:
    """ms per step = (t(long) - t(short)) / (long - short): prefill and constant costs cancel.

    A step is a token of each request, also where a speculative round gives several. All engines
    stay alive; those that wait are stopped. Each repeat measures stock, then ours.
    """
    wiring.check(options)
    plan.check(model, vllm_args)
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        wanted = Wanted(
            plan.lengths,
            max(plan.batch_sizes),
            requests=[(request, {"max_tokens": 1}) for request in plan.prompts],
            images=bool(plan.images),
            adapters=plan.adapters,
        )
        given: dict[str, tuple[Kind, tuple[str, ...]]] = {kind: (kind, vllm_args) for kind in KINDS}
        if plan.without_drafts:
            given[PLAIN] = ("fusedstep", drop_speculation(vllm_args))
        for name, (kind, args) in given.items():
            progress.say(f"{name}: starting the engine")
            engines[name] = stack.enter_context(Engine(kind, model, options, args, wanted))
            engines[name].stop_clock()
        result = Result(describe(model, options, vllm_args), [], {})
        for temperature in plan.temperatures:
            for batch_size in plan.batch_sizes:
                rows = _point(engines, plan, batch_size, temperature, progress.say)
                result.rows.extend(rows[: len(KINDS)])
                result = replace(result, plain=(*result.plain, *rows[len(KINDS) :]))
                progress.keep(result.as_dict())
        for name, engine in engines.items():
            engine.go_on()
            result.peak_rss_mib[name] = engine.call("rpc", method="peak_rss_bytes") / (1 << 20)
            if (share := engine.call("accepted_share")) is not None:
                result.env.setdefault("accepted_drafts", {})[name] = share
            if name == "fusedstep":  # what ran, where "auto" was asked for
                stats = engine.call("rpc", method="window_stats")
                known = ("ops", "loop", "stock_steps")
                result.env.update({key: stats[key] for key in known if key in stats})
            engine.stop_clock()
        return result


def _point(
    engines: dict[str, Engine],
    plan: Plan,
    batch_size: int,
    temperature: float,
    say: Callable[[str], None],
) -> list[Row]:
    """All repeats of one batch size and temperature, engines alternating."""
    steps = plan.output_len - plan.short_len
    steps *= max(-(-len(plan.prompts) // batch_size), 1)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    idle_share: dict[str, float] = {}
    tokens: dict[str, Any] = {}
    for repeat in range(plan.repeats + 1):
        turn = f"repeat {repeat} of {plan.repeats}" if repeat else "warming up"
        say(f"batch {batch_size}, temperature {temperature:g}: {turn}")
        for name, engine in engines.items():
            engine.go_on()
            if repeat == 0:  # warm up, then watch the forwards, which costs a little
                _generate(engine, plan, batch_size, temperature, plan.short_len, -1)
                engine.call("rpc", method="watch_forwards")
            short = _generate(engine, plan, batch_size, temperature, plan.short_len, repeat)
            long = _generate(engine, plan, batch_size, temperature, plan.output_len, repeat)
            if repeat == 0:
                idle_share[name] = 1 - (long.in_forward - short.in_forward) / (
                    long.seconds - short.seconds
                )
                engine.call("rpc", method="look_away")
            else:
                seconds[name].append((long.seconds - short.seconds) / steps)
            engine.stop_clock()
            tokens[name] = long.tokens
    rows = []
    for name in engines:
        repeats_ms = [1e3 * s for s in seconds[name]]
        spread = Spread.of(repeats_ms)
        rows.append(
            Row(
                engine="stock" if name == "stock" else "fusedstep",
                batch_size=batch_size,
                temperature=temperature,
                ms_per_step=spread,
                tokens_per_s=1e3 * batch_size / spread.p50,
                idle_share=idle_share[name],
                same_tokens=temperature > 0 or tokens[name] == tokens["stock"],
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
    """Timed calls of ``generate``: of random prompts, or of all those given, batch by batch."""
    params = {
        "temperature": temperature,
        "max_tokens": output_len,
        "min_tokens": 0,
        "ignore_eos": True,
        "detokenize": plan.detokenize,
        **(plan.sampling if temperature > 0 else {}),
    }
    before = engine.call("rpc", method="seconds_in_forward")
    total, all_tokens = 0.0, []
    for prompts in _batches(engine, plan, batch_size, f"{batch_size}/{repeat}/{output_len}"):
        seconds, tokens = engine.call(
            "generate", prompts=prompts, params=[params] * batch_size, timing=True
        )
        total += seconds
        all_tokens += tokens
    if plan.prompts and {len(tokens) for tokens in all_tokens} != {output_len}:
        raise ConfigError(
            f"--prompts and --output-len {output_len} do not fit into the model's context: "
            "shorten them, or raise --max-model-len if the model can"
        )
    after = engine.call("rpc", method="seconds_in_forward")
    return _Run(total, after - before, all_tokens)


def _batches(engine: Engine, plan: Plan, batch_size: int, seed: str) -> Iterator[list[Any]]:
    """Prompts, the same for all engines. Those given are taken again until a batch is full."""
    if plan.prompts:
        texts = [request.prompt for request in plan.prompts]
        in_turn = itertools.cycle(texts)
        for _ in range(0, len(texts), batch_size):
            yield list(itertools.islice(in_turn, batch_size))
        return
    rng = random.Random(seed)
    vocab_size = engine.call("vocab_size")
    random_ids = [
        [rng.randrange(vocab_size) for _ in range(plan.input_len)] for _ in range(batch_size)
    ]
    if plan.images:
        images = itertools.cycle(plan.images)
        yield [ImagePrompt(ids, image) for ids, image in zip(random_ids, images, strict=False)]
    else:
        yield [{"prompt_token_ids": token_ids} for token_ids in random_ids]
