"""An engine without vLLM, for the tests of ``bench.gpu_check``: tokens follow from the prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fusedstep.bench.gpu_check import report as gpu_report
from fusedstep.bench.gpu_check.measure import OURS, STOCK, Plan
from fusedstep.errors import ConfigError, FusedStepError

VOCAB = 1024
FACTS = gpu_report.STOCK | {"dtype": "float32"}
PLAN = Plan(
    device="cpu",
    models=("tiny",),
    batch_sizes=(1, 2),
    temperatures=(0.0, 1.0),
    forms=("while", "eager"),
    repeats=2,
    minutes=9.0,
    dtype="float32",
    input_len=3,
    short_len=2,
    long_len=6,
    equality_requests=4,
    equality_tokens=5,
)


class Clock:
    """Time that only engines spend."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeEngine:
    """Tokens from the prompt; ``wrong`` forms give others, ``deadly`` ones end the engine."""

    wrong: tuple[str, ...] = ()
    deadly: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    chosen = "while"  # by an engine that is asked for the best form
    facts: dict[str, Any] = FACTS
    seconds_per_call = 1.0
    seen: list[tuple[str, str]]

    def __init__(self, kind: str, clock: Clock, loop: str = "eager") -> None:
        self.kind, self.clock = kind, clock
        self.process = SimpleNamespace(pid=None)  # 0 would be the test's own group
        self.form = self.first = loop
        self.awake, self.dead, self.closed = True, False, False
        self.clock.now += self.seconds_per_call

    def call(self, method: str, /, **kwargs: Any) -> Any:
        assert self.awake, "a stopped engine was asked"
        if self.dead:
            raise FusedStepError(f"the {self.kind} engine died")
        if method == "rpc":
            return getattr(self, kwargs["method"])(*kwargs["args"])
        self.seen.append((self.kind, self.form))
        self.clock.now += self.seconds_per_call
        tokens = [
            self._tokens(*request)
            for request in zip(kwargs["prompts"], kwargs["params"], strict=True)
        ]
        if kwargs.get("timing"):
            speed = 2.0 if self.kind == STOCK else 1.0
            return speed * sum(map(len, tokens)) / len(tokens), tokens
        return [output(t) for t in tokens]

    def _tokens(self, prompt: dict[str, Any], params: dict[str, Any]) -> list[int]:
        if self.form in self.deadly and self.kind == OURS:
            self.dead = True
            raise FusedStepError(f"the {self.kind} engine died")
        first = sum(prompt["prompt_token_ids"]) + params["seed"]
        tokens = [(first + 7 * i) % VOCAB for i in range(params["max_tokens"])]
        if self.form in self.wrong and self.kind == OURS:
            tokens[-1] = (tokens[-1] + 1) % VOCAB
        return tokens

    def use_loop(self, loop: str) -> dict[str, str]:
        if loop in self.broken:
            raise ConfigError(f"the {self.kind} engine: no {loop}")
        self.form = loop
        return {"loop": loop, "loop_reason": "works here"}

    def window_stats(self) -> dict[str, str]:
        return {"loop": self.chosen, "loop_reason": "proved"}

    def engine_facts(self) -> dict[str, Any]:
        return dict(self.facts)

    def settle(self) -> None:
        pass

    def seconds_in_forward(self) -> float:
        return self.clock.now / 4

    host_seconds = seconds_in_forward
    watch_forwards = look_away = watch_host = stop_watching_host = settle

    def trace_kernels(self) -> None:
        pass

    def kernel_trace(self, num_steps: int) -> dict[str, Any]:
        idle = 0.4 if self.kind == STOCK else 0.01
        return {"num_kernels": 9, "idle_share": idle, "reason": "", "longest": ()}

    def randomise_weights(self, seed: int, vocab_size: int) -> int:
        return 1

    def stop_clock(self) -> None:
        self.awake = False

    def go_on(self) -> None:
        self.awake = True

    def kill(self) -> None:
        self.dead = True

    def close(self) -> None:
        self.closed = True


def output(tokens: list[int], logprobs: Any = None) -> dict[str, Any]:
    completion = {"token_ids": tokens, "finish_reason": "length", "logprobs": logprobs}
    return {"prompt": None, "completions": [completion]}
