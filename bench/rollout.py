"""RL rollouts: prompts with several long samples each, stock vLLM and fusedstep alternating.

Samples end one after the other, so a batch gets thin: what that costs is measured, too.
"""

from __future__ import annotations

import math
import random
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fusedstep.bench.engine import Engine, Kind
from fusedstep.bench.environment import describe
from fusedstep.bench.progress import NO_PROGRESS, Progress
from fusedstep.bench.prompts import Request
from fusedstep.bench.rollout_result import Comparison, Result, Row, Run, compare
from fusedstep.bench.wanted import Wanted
from fusedstep.errors import ConfigError
from fusedstep.options import Options
from fusedstep.vllm_plugin.launch import early, wiring

KINDS: tuple[Kind, ...] = ("stock", "fusedstep")
# Sampling fields that the command's own options give, or on which the comparison depends.
CHOSEN = {"n", "temperature", "max_tokens", "ignore_eos", "detokenize", "logprobs", "seed"}
# Ragged lengths are log-normal: many short samples, few long ones.
MEDIAN, SIGMA = 0.25, 0.8  # share of the longest; standard deviation of the logarithm

Lengths = Literal["ragged", "equal"]


@dataclass(frozen=True)
class Plan:
    """Settings of a measurement. Lengths in tokens."""

    num_prompts: int
    samples: int  # of each prompt
    input_len: int
    output_len: int  # of the longest sample
    lengths: Lengths
    temperature: float
    logprobs: int | None
    repeats: int
    sampling: dict[str, Any] = field(default_factory=dict)  # further SamplingParams
    detokenize: bool = True

    @property
    def num_samples(self) -> int:
        return self.num_prompts * self.samples

    def wanted(self) -> Wanted:
        """The room that an engine's configuration must have."""
        asked = Request("", where="the requests of bench rollout")
        return Wanted(self._share, requests=[(asked, self._params(1, 0))])

    @property
    def _share(self) -> dict[str, int]:
        return {"--input-len": self.input_len, "--output-len": self.output_len}

    def check(self, model: str, vllm_args: tuple[str, ...]) -> None:
        """Raises ConfigError for what no engine needs to be started for."""
        for name in self.sampling.keys() & CHOSEN:
            raise ConfigError(f"--sampling: {name} is chosen by bench rollout: leave it out")
        early.check_lengths(model, vllm_args, self._share)
        most = early.value_of(vllm_args, "--max-logprobs") or ""
        if most.isdecimal() and (self.logprobs or 0) > int(most):
            raise ConfigError(
                f"--logprobs {self.logprobs} is more than --max-logprobs {most}: raise that"
            )

    def output_lens(self, repeat: int) -> list[int]:
        """The length of each sample, the same for both engines."""
        if self.lengths == "equal":
            return [self.output_len] * self.num_samples
        rng = random.Random(f"lengths {repeat}")
        drawn = (
            math.ceil(self.output_len * MEDIAN * rng.lognormvariate(0, SIGMA))
            for _ in range(self.num_samples)
        )
        return [min(length, self.output_len) for length in drawn]

    def requests(self, repeat: int, vocab_size: int) -> tuple[list[Any], list[dict[str, Any]]]:
        """Prompts and sampling fields: a request per sample, as some end before others.

        A sample draws what it would as one of its prompt's ``n``: vLLM counts their seeds up.
        """
        rng = random.Random(f"prompts {repeat}")
        token_ids = [
            [rng.randrange(vocab_size) for _ in range(self.input_len)]
            for _ in range(self.num_prompts)
        ]
        prompts = [{"prompt_token_ids": ids} for ids in token_ids for _ in range(self.samples)]
        seeds = range(repeat * self.num_samples, (repeat + 1) * self.num_samples)
        return prompts, list(map(self._params, self.output_lens(repeat), seeds))

    def _params(self, output_len: int, seed: int) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "max_tokens": output_len,
            "ignore_eos": True,
            "detokenize": self.detokenize,
            "logprobs": self.logprobs,
            "seed": seed,
            **self.sampling,
        }


def measure(
    model: str,
    plan: Plan,
    options: Options,
    vllm_args: tuple[str, ...],
    progress: Progress = NO_PROGRESS,
) -> Result:
    """Both engines stay alive; the one that waits is stopped. Each repeat takes stock, then ours.

    The outputs of the first repeat are held against stock's: where requests sample, against those
    of its Model Runner V2, whose random numbers a seed promises.
    """
    wiring.check(options)
    plan.check(model, vllm_args)
    oracle: Kind = "oracle" if plan.temperature > 0 and wiring.is_cpu_build() else "stock"
    expected: Run | None = None
    if oracle != "stock":
        progress.say(f"{oracle}: starting the engine")
        with Engine(oracle, model, options, vllm_args, plan.wanted()) as engine:
            progress.say(f"{oracle}: {plan.num_samples} samples, to compare")
            expected = _roll_out(engine, plan, 1)
    with ExitStack() as stack:
        engines: dict[Kind, Engine] = {}
        for kind in KINDS:
            progress.say(f"{kind}: starting the engine")
            engines[kind] = stack.enter_context(
                Engine(kind, model, options, vllm_args, plan.wanted())
            )
            facts = engines[kind].call("rpc", method="engine_facts")
            if kind == "fusedstep":  # what ran, where "auto" was asked for
                stats = engines[kind].call("rpc", method="window_stats")
            engines[kind].stop_clock()
        env = describe(model, options, vllm_args) | asdict(plan) | {"dtype": facts["dtype"]}
        env |= {name: stats[name] for name in ("ops", "loop") if name in stats}
        runs: dict[Kind, list[Run]] = {kind: [] for kind in KINDS}
        comparison: Comparison | None = None
        for repeat in range(plan.repeats + 1):
            progress.say(f"repeat {repeat} of {plan.repeats}" if repeat else "warming up")
            for kind, engine in engines.items():
                engine.go_on()
                runs[kind].append(_roll_out(engine, plan, repeat))
                engine.stop_clock()
            if repeat == 0:
                runs = {kind: [] for kind in KINDS}
                continue
            if repeat == 1:
                want, have = expected or runs["stock"][0], runs["fusedstep"][0]
                comparison = compare(want, have, oracle, facts["dtype"])
            assert comparison is not None
            result = Result(env, [Row.of(kind, runs[kind]) for kind in KINDS], comparison)
            progress.keep(result.as_dict())
    return result


def _roll_out(engine: Engine, plan: Plan, repeat: int) -> Run:
    """All samples of a repeat, from the first request to the last token."""
    prompts, params = plan.requests(repeat, engine.call("vocab_size"))
    before = engine.call("window_counts")
    told = engine.call("roll_out", prompts=prompts, params=params)
    return Run.of(told, engine.call("window_counts"), before)
