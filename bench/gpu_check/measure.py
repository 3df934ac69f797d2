"""Stock vLLM and fusedstep side by side on one device: one point of a form of the loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from fusedstep.bench.engine import Engine, Kind
from fusedstep.bench.gpu_check.equality import (
    SAMPLED,
    Batch,
    Difference,
    Outputs,
    differences,
    make_batch,
)
from fusedstep.bench.gpu_check.models import SEED, Model
from fusedstep.bench.spread import Spread
from fusedstep.errors import FusedStepError
from fusedstep.loop_forms import LoopForm
from fusedstep.options import Options

# Stock with Model Runner V2, whose random numbers are ours; on CUDA that is vLLM as it comes.
STOCK: Kind = "oracle"
OURS: Kind = "fusedstep"
MAX_BATCH_SIZE = 256
MAX_MODEL_LEN = 2048
RESERVED_TOKENS = 192  # KV slots of a request beyond its tokens: two windows, and rounding
OpenEngine = Callable[[Kind, str, Options, tuple[str, ...]], Any]


@dataclass(frozen=True)
class Plan:
    """Settings of a run, and how long it may take. Lengths in tokens."""

    device: str  # cuda or cpu
    models: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    temperatures: tuple[float, ...]
    forms: tuple[str, ...]
    repeats: int
    minutes: float
    dtype: str
    input_len: int
    short_len: int
    long_len: int
    equality_requests: int
    equality_tokens: int

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Start:
    """How a pair of engines starts. ``as_served``: one after the other, with vLLM's own batch and
    graph sizes, its memory profile and the proof, as a user's engine does."""

    loop: str = LoopForm.EAGER  # forms are chosen later: none can keep the engine from starting
    as_served: bool = False
    seconds: float | None = None  # that each engine may take


@dataclass(frozen=True)
class Side:
    """One engine at one point; None where it was not or cannot be measured."""

    ms_per_step: Spread
    host_ms_per_step: float | None
    idle_share: float | None
    idle_by: str  # what the idle share is from, or why there is none
    longest: tuple[dict[str, Any], ...] = ()  # kernels of a trace: name, count, share of the time


@dataclass(frozen=True)
class Row:
    """A form of the loop against stock at one batch size and temperature."""

    model: str
    form: str  # asked for
    ran: str
    batch_size: int
    temperature: float
    equal: bool
    near_ties: int
    stock: Side
    fusedstep: Side

    @property
    def ratio(self) -> float | None:
        """Stock's time by ours; there is none of different outputs, nor of mere noise."""
        stock, ours = self.stock.ms_per_step.p50, self.fusedstep.ms_per_step.p50
        return stock / ours if self.equal and min(stock, ours) > 0 else None


def vllm_args(model: Model, plan: Plan, kind: Kind, *, as_served: bool = False) -> tuple[str, ...]:
    """The same engine twice, small enough for both on one GPU."""
    tokens = max(plan.batch_sizes) * (plan.input_len + plan.long_len + RESERVED_TOKENS)
    kv_cache = max(tokens, 2 * MAX_MODEL_LEN) * model.kv_bytes_per_token(plan.dtype)
    args = ["--skip-tokenizer-init", "--no-enable-prefix-caching", "--async-scheduling"]
    args += ["--seed", str(SEED), "--dtype", plan.dtype, "--max-model-len", str(MAX_MODEL_LEN)]
    if model.dummy:
        args += ["--load-format", "dummy"]
    if not (as_served and plan.on_gpu):
        args += ["--max-num-seqs", str(MAX_BATCH_SIZE), "--kv-cache-memory-bytes", str(kv_cache)]
    if as_served and plan.on_gpu:
        args += ["--gpu-memory-utilization", "0.4"]
    elif plan.on_gpu:  # vLLM wants this share free at the start; the KV cache is sized above
        sizes = {"cudagraph_capture_sizes": sorted(plan.batch_sizes)}
        args += ["--gpu-memory-utilization", "0.3", "--compilation-config", json.dumps(sizes)]
    else:
        args += ["--enforce-eager"]
    if kind == STOCK:  # of requests that ask for logprobs: what the noise is added to
        args += ["--logprobs-mode", "processed_logprobs"]
    return tuple(args)


class Pair:
    """Both engines of a model. The one that waits is stopped, with nothing in flight."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        how: Start = Start(),
        open_engine: OpenEngine | None = None,
    ) -> None:
        self.model, self.plan = model, plan
        self.killed = False
        self.engines: dict[Kind, Any] = {}
        opens = open_engine or partial(Engine, start_seconds=how.seconds)
        options = Options.parse({"decode_steps": "auto", "ops": "auto", "loop": how.loop})

        def start(kind: Kind) -> None:
            args = vllm_args(model, plan, kind, as_served=how.as_served)
            self.engines[kind] = opens(kind, str(model.path), options, args)

        try:
            # Each measures the memory that is free: side by side they would see each other.
            alone = how.as_served and plan.on_gpu
            with ThreadPoolExecutor(1 if alone else 2) as pool:
                list(pool.map(start, (STOCK, OURS)))
            for kind, engine in self.engines.items():
                if model.dummy:
                    self.rpc(kind, "randomise_weights", SEED, model.vocab_size)
                engine.stop_clock()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def awake(self, kind: Kind) -> Iterator[Any]:
        """The engine runs; at the end its device has nothing left to do."""
        engine = self.engines[kind]
        engine.go_on()
        try:
            yield engine
            self.rpc(kind, "settle")
        finally:
            with suppress(ProcessLookupError):
                engine.stop_clock()

    def rpc(self, kind: Kind, method: str, *args: Any) -> Any:
        return self.engines[kind].call("rpc", method=method, args=args)

    def ask(self, kind: Kind, method: str, *args: Any) -> Any:
        """``rpc`` of an engine that is asleep."""
        with self.awake(kind):
            return self.rpc(kind, method, *args)

    def outputs(self, kind: Kind, batch: Batch) -> Outputs:
        return self._outputs(kind, batch.prompts, batch.params)

    def stock_outputs(self, prompts: list[Any], params: list[dict[str, Any]]) -> Outputs:
        """To look at a difference."""
        return self._outputs(STOCK, prompts, params)

    def _outputs(self, kind: Kind, prompts: list[Any], params: list[dict[str, Any]]) -> Outputs:
        with self.awake(kind) as engine:
            outputs: Outputs = engine.call("generate", prompts=prompts, params=params)
        return outputs

    def timed(self, kind: Kind, batch: Batch) -> tuple[float, Outputs]:
        """Seconds and tokens; the engine is awake."""
        seconds, tokens = self.engines[kind].call(
            "generate", prompts=batch.prompts, params=batch.params, timing=True
        )
        return seconds, [_as_output(token_ids) for token_ids in tokens]

    def kill(self) -> None:
        """End both at once, whatever they do."""
        self.killed = True
        for engine in self.engines.values():
            engine.kill()

    def alive(self) -> bool:
        """Do both still answer?"""
        try:
            for kind in self.engines:
                self.ask(kind, "settle")
        except (FusedStepError, OSError):
            return False
        return True

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def _as_output(token_ids: Any) -> dict[str, Any]:
    completion = {"token_ids": list(token_ids), "finish_reason": None, "logprobs": None}
    return {"prompt": None, "completions": [completion]}


def point_batch(
    plan: Plan, model: Model, size: int, temperature: float, n: int, turn: int
) -> Batch:
    """``size`` requests of ``n`` tokens; ``turn`` makes the prompts others."""
    sampling = SAMPLED | {"temperature": temperature} if temperature > 0 else {"temperature": 0.0}
    name = f"batch {size}, temperature {temperature:g}, turn {turn}, {n} tokens"
    return make_batch(
        name, [sampling] * size, [plan.input_len] * size, [n] * size, model.vocab_size
    )


def measure_point(
    pair: Pair, form: str, ran: str, size: int, temperature: float
) -> tuple[Row, list[Difference]]:
    """ms per step = (t(long) - t(short)) / (long - short), stock and ours in turn."""
    plan, model = pair.plan, pair.model
    steps = plan.long_len - plan.short_len
    seconds: dict[Kind, list[float]] = {STOCK: [], OURS: []}
    watched: dict[Kind, tuple[float | None, float | None, str]] = {}
    found: list[Difference] = []
    for turn in range(plan.repeats + 1):
        short, long = (
            point_batch(plan, model, size, temperature, n, turn)
            for n in (plan.short_len, plan.long_len)
        )
        tokens: dict[Kind, Outputs] = {}
        for kind in (STOCK, OURS):
            with pair.awake(kind):
                if turn == 0:  # warm up; then watch, which may cost a little
                    pair.timed(kind, short)
                    watched[kind], tokens[kind] = _watch(pair, kind, short, long)
                    continue
                began, _ = pair.timed(kind, short)
                ended, tokens[kind] = pair.timed(kind, long)
                seconds[kind].append(1e3 * (ended - began) / steps)
        found += differences(long, tokens[STOCK], tokens[OURS], plan.dtype, pair.stock_outputs)
    sides = {kind: Side(Spread.of(seconds[kind]), *watched[kind]) for kind in (STOCK, OURS)}
    return (
        Row(
            model=model.name,
            form=form,
            ran=ran,
            batch_size=size,
            temperature=temperature,
            equal=all(difference.verdict == "near-tie" for difference in found),
            near_ties=sum(difference.verdict == "near-tie" for difference in found),
            stock=sides[STOCK],
            fusedstep=sides[OURS],
        ),
        found,
    )


def _watch(
    pair: Pair, kind: Kind, short: Batch, long: Batch
) -> tuple[tuple[float | None, float | None, str], Outputs]:
    """Host ms per step, idle share and where it is from, and the long run's tokens.

    On a GPU the host's work is told from its waiting, and the idle share comes later, from the
    profiler. On the CPU host and device are one: what is known is the time in no forward.
    """
    start, read, stop = (
        ("watch_host", "host_seconds", "stop_watching_host")
        if pair.plan.on_gpu
        else ("watch_forwards", "seconds_in_forward", "look_away")
    )
    pair.rpc(kind, start)
    marks, times = [pair.rpc(kind, read)], []
    for batch in (short, long):
        seconds, tokens = pair.timed(kind, batch)
        times.append(seconds)
        marks.append(pair.rpc(kind, read))
    pair.rpc(kind, stop)
    work = (marks[2] - marks[1]) - (marks[1] - marks[0])
    if pair.plan.on_gpu:
        host = 1e3 * work / (pair.plan.long_len - pair.plan.short_len)
        return (host, None, "not traced"), tokens
    return (None, 1 - work / (times[1] - times[0]), "time in no forward"), tokens


def trace_point(pair: Pair, kind: Kind, size: int) -> dict[str, Any]:
    """``gpu_trace.Trace`` of one greedy generate, traced kernel by kernel."""
    batch = point_batch(pair.plan, pair.model, size, 0.0, pair.plan.short_len, 0)
    with pair.awake(kind):
        pair.timed(kind, batch)
        pair.rpc(kind, "trace_kernels")
        pair.timed(kind, batch)
        trace: dict[str, Any] = pair.rpc(kind, "kernel_trace", pair.plan.short_len)
        return trace
