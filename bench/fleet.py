"""A fleet with windows: replicas behind a router, in simulated time, with the real policy.

    python -m fusedstep.bench.fleet --replicas 1,100 --load 0.5,0.8

``fusedstep/policy.py`` decides every window; how long a step takes is a straight line, given as
options. Nothing is measured, and no model runs: the result is as good as that line.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from fusedstep.policy import DecodeSteps, StepTimes, Turn, decide

STOCK = "stock"
ROUTERS = ("least", "round-robin", "random")
BUDGET = 8192  # tokens of a turn
HIGHEST = 40  # of the loads that are tried for a goal, in steps of
LOAD_STEP = 0.05


@dataclass(frozen=True)
class StepModel:
    """Milliseconds of a decode step, a straight line over the rows; a prompt's tokens on top."""

    ms: float
    row_ms: float
    token_ms: float  # of a prompt

    def of(self, rows: int) -> float:
        return self.ms + self.row_ms * rows


@dataclass
class Request:
    arrives: float  # ms
    prompt: int
    left: int  # tokens to come
    first: float = -1.0
    last: float = 0.0
    tokens: int = 0
    longest_pause: float = 0.0

    def tokens_between(self, begin: float, end: float) -> float:
        """As if they had come evenly between the first and the last."""
        inside = min(self.last, end) - max(self.first, begin)
        return self.tokens * max(inside, 0.0) / max(self.last - self.first, 1e-9)


@dataclass
class Counts:
    windows: int = 0
    steps: int = 0  # of windows
    unused: int = 0  # reserved, not run


@dataclass
class Engine:
    """A kind of replica: stock if ``policy`` is None, whose host comes by after every step."""

    model: StepModel
    max_rows: int
    streams: bool
    latency_ms: float
    policy: DecodeSteps | None


@dataclass
class Replica:
    """One engine. Its turns follow each other without a gap while it has requests."""

    engine: Engine
    counts: Counts
    running: list[Request] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    times: StepTimes = field(default_factory=StepTimes)
    began: float = -1.0  # of the turn under way; -1: idle
    steps: int = 0  # of it
    reserved: int = 0
    step_ms: float = 0.0
    joining: list[Request] = field(default_factory=list)
    version: int = 0  # of the end of this turn

    def begin(self, now: float) -> float | None:
        """The next turn, if there is one; when it ends."""
        self.version += 1
        engine, free = self.engine, self.engine.max_rows - len(self.running)
        tokens = BUDGET - len(self.running)
        self.joining = []
        while self.waiting and free and tokens >= self.waiting[0].prompt:
            tokens -= self.waiting[0].prompt
            self.joining.append(self.waiting.popleft())
            free -= 1
        rows = len(self.running) + len(self.joining)
        if not rows:
            self.began = -1.0
            return None
        self.began, self.step_ms = now, engine.model.of(rows)
        self.steps = self.reserved = 1
        if self.joining:
            self.step_ms += engine.model.token_ms * sum(r.prompt for r in self.joining)
        else:
            self._window(rows)
        return now + self.steps * self.step_ms

    def _window(self, rows: int) -> None:
        """How many steps come before anybody looks at the requests again."""
        left = [request.left for request in self.running]
        if self.engine.policy is None:  # every step: until the first of them ends
            self.steps = self.reserved = min(left)
            return
        average, measured = self.times.get(rows)
        turn = Turn(
            remaining=left,
            full_house=bool(self.waiting),
            streams=self.engine.streams,
            latency_ms=self.engine.latency_ms,
            step_ms=average,
            step_measured=measured,
        )
        decision = decide(self.engine.policy, turn)
        self.reserved = self.steps = decision.num_steps
        if decision.num_stops == 1:
            self.steps = min(self.steps, *left)

    def arrival(self, now: float) -> float | None:
        """One came: the turn ends after the step in flight if it can be admitted; when, if so."""
        if self.joining or len(self.running) >= self.engine.max_rows:
            return None
        done = max(1, math.ceil((now - self.began) / self.step_ms))
        if done >= self.steps:
            return None
        self.version += 1
        self.steps = done
        return self.began + self.steps * self.step_ms

    def end(self, now: float) -> None:
        """The turn's tokens reach their clients: stock's one by one, a window's together."""
        counts, engine = self.counts, self.engine
        if engine.policy and not self.joining:
            counts.windows += 1
            counts.steps += self.steps
            counts.unused += self.reserved - self.steps
            self.times.add(len(self.running), self.steps, self.steps * self.step_ms)
        self.running += self.joining
        for request in self.running:
            came = min(self.steps, request.left)
            at = now if engine.policy else now - (self.steps - came) * self.step_ms
            if request.first < 0:
                request.first = at
            else:
                pause = at - request.last if engine.policy else self.step_ms
                request.longest_pause = max(request.longest_pause, pause)
            request.last = at
            request.left -= came
            request.tokens += came
        self.running = [request for request in self.running if request.left]

    @property
    def held(self) -> int:
        return len(self.running) + len(self.waiting) + len(self.joining)


class Router:
    """Which replica gets the next request; ``least``: one that has the fewest, any of them."""

    def __init__(self, name: str, replicas: list[Replica], random: Random) -> None:
        self.name, self.replicas, self.random = name, replicas, random
        self.sent = 0
        self.known: list[tuple[int, float, int]] = []  # requests, chance, replica; old ones too
        for number in range(len(replicas)):
            self.changed(number)

    def changed(self, number: int) -> None:
        """This replica has more requests than before, or fewer."""
        if self.name == "least":
            entry = self.replicas[number].held, self.random.random(), number
            heapq.heappush(self.known, entry)

    def choose(self) -> int:
        self.sent += 1
        if self.name == "random":
            return self.random.randrange(len(self.replicas))
        if self.name == "round-robin":
            return self.sent % len(self.replicas)
        while self.known[0][0] != self.replicas[self.known[0][2]].held:
            heapq.heappop(self.known)
        return self.known[0][2]


def simulate(
    engine: Engine, num_replicas: int, requests: list[Request], routing: str, random: Random
) -> Counts:
    """Run all requests, which are filled in, to their end."""
    counts = Counts()
    replicas = [Replica(engine, counts) for _ in range(num_replicas)]
    router = Router(routing, replicas, random)
    ends: list[tuple[float, int, int]] = []  # when, replica, version

    def push(number: int, at: float | None) -> None:
        if at is not None:
            heapq.heappush(ends, (at, number, replicas[number].version))

    def turns_until(now: float) -> None:
        while ends and ends[0][0] <= now:
            at, number, version = heapq.heappop(ends)
            replica = replicas[number]
            if version == replica.version:
                replica.end(at)
                push(number, replica.begin(at))
                router.changed(number)

    for request in requests:
        turns_until(request.arrives)
        number = router.choose()
        replica = replicas[number]
        replica.waiting.append(request)
        idle = replica.began < 0
        push(number, replica.begin(request.arrives) if idle else replica.arrival(request.arrives))
        router.changed(number)
    turns_until(math.inf)
    return counts


def arrivals(options: argparse.Namespace, per_second: float, seed: int) -> Iterator[Request]:
    """Poisson, for so many seconds; lengths are log-normal around their medians."""
    random, now = Random(seed), 0.0
    while True:
        now += random.expovariate(per_second) * 1000
        if now > options.seconds * 1000:
            return
        output = round(options.output_len * random.lognormvariate(0, options.spread))
        yield Request(now, options.prompt_len, max(1, output))


def capacity(options: argparse.Namespace, stock: StepModel) -> float:
    """Requests per second of a stock replica whose rows are all taken."""
    mean = options.output_len * math.exp(options.spread**2 / 2)
    ms: float = mean * stock.of(options.rows) / options.rows + options.prompt_len * stock.token_ms
    return 1000 / ms


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Run:
    """One engine on one fleet under one load."""

    requests: list[Request]
    counts: Counts

    def ttft(self, share: float) -> float:
        return percentile([request.first - request.arrives for request in self.requests], share)

    def windows(self) -> list[str]:
        """Their mean length, and the share of their steps that was reserved and not run."""
        counts = self.counts
        if not counts.windows:
            return ["1", "-"]
        unused = counts.unused / (counts.steps + counts.unused)
        return [f"{counts.steps / counts.windows:.1f}", f"{100 * unused:.0f} %"]

    def row(self, replicas: int) -> list[str]:
        requests = self.requests
        gaps = [(r.last - r.first) / (r.tokens - 1) for r in requests if r.tokens > 1]
        end = max(request.arrives for request in requests)
        tokens = sum(request.tokens_between(end / 2, end) for request in requests)
        return [
            f"{self.ttft(0.5):.1f}",
            f"{self.ttft(0.99):.1f}",
            f"{percentile(gaps, 0.5):.2f}",
            f"{percentile([r.longest_pause for r in requests], 0.99):.0f}",
            f"{tokens / (end / 2) / replicas * 1000:.0f}",
            *self.windows(),
        ]


def run(options: argparse.Namespace, replicas: int, load: float, steps: str) -> Run:
    """``steps``: ``stock``, or what --decode-steps takes."""
    stock = StepModel(options.stock_step_ms, options.stock_row_ms, options.token_ms)
    ours = StepModel(options.step_ms, options.row_ms, options.token_ms)
    policy = None if steps == STOCK else DecodeSteps.parse(steps)
    model = ours if policy else stock
    engine = Engine(model, options.rows, not options.final_only, options.latency_ms, policy)
    per_second = load * capacity(options, stock) * replicas
    requests = list(arrivals(options, per_second, options.seed))
    counts = simulate(engine, replicas, requests, options.router, Random(options.seed))
    return Run(requests, counts)


def highest_load(options: argparse.Namespace, replicas: int, steps: str) -> float:
    """The highest that keeps the goal, TTFT p99; 0 if none does."""
    good, bad = 0, HIGHEST + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        found = run(options, replicas, middle * LOAD_STEP, steps)
        if found.ttft(0.99) <= options.ttft_goal:
            good = middle
        else:
            bad = middle
    return good * LOAD_STEP


HEADER = [
    *("replicas", "load", "engine", "TTFT p50, ms", "p99", "ms per token"),
    *("longest pause p99, ms", "tokens/s per replica", "steps per window", "not used"),
]
GOAL_HEADER = ["replicas", "engine", "highest load", "requests/s per replica"]


def table(options: argparse.Namespace) -> Iterator[list[str]]:
    yield HEADER
    for replicas in options.replicas:
        for load in options.load:
            for steps in (STOCK, *options.decode_steps):
                found = run(options, replicas, load, steps)
                yield [f"{replicas}", f"{load:g}", name(steps), *found.row(replicas)]


def goal_table(options: argparse.Namespace) -> Iterator[list[str]]:
    yield GOAL_HEADER
    stock = StepModel(options.stock_step_ms, options.stock_row_ms, options.token_ms)
    for replicas in options.replicas:
        for steps in (STOCK, *options.decode_steps):
            load = highest_load(options, replicas, steps)
            per_second = load * capacity(options, stock)
            yield [f"{replicas}", name(steps), f"{load:.2f}", f"{per_second:.1f}"]


def name(steps: str) -> str:
    return steps if steps == STOCK else f"K {steps}"


def numbers(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    return lambda text: [kind(word) for word in text.split(",")]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m fusedstep.bench.fleet", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add = made.add_argument
    add("--replicas", type=numbers(int), default=[1, 10, 100], help="1,10,100")
    add(
        "--load",
        type=numbers(float),
        default=[0.5, 0.8],
        help="of what a stock replica can do",
    )
    add("--ttft-goal", type=float, help="ms: find the highest load whose TTFT p99 is no longer")
    add("--decode-steps", type=lambda text: text.split(","), default=["auto"], help="auto,16")
    add("--router", choices=ROUTERS, default="least", help="who gets a request")
    add("--rows", type=int, default=64, help="max_num_seqs")
    add("--prompt-len", type=int, default=512)
    add("--output-len", type=int, default=256, help="the median")
    add("--spread", type=float, default=0.5, help="sigma of the log-normal lengths")
    add("--final-only", action="store_true", help="nobody streams")
    add("--latency-ms", type=float, default=50.0, help="--window-latency-ms")
    add("--step-ms", type=float, default=1.34, help="a step of a window, without rows")
    add("--row-ms", type=float, default=0.012, help="... and for each row")
    add("--stock-step-ms", type=float, default=1.72, help="a step of stock's, without rows")
    add("--stock-row-ms", type=float, default=0.038, help="... and for each row")
    add("--token-ms", type=float, default=0.02, help="a token of a prompt")
    add("--seconds", type=float, default=20.0, help="simulated, of arrivals")
    add("--seed", type=int, default=1)
    return made


def main(words: list[str] | None = None) -> int:
    options = parser().parse_args(words)
    lines = table(options) if options.ttft_goal is None else goal_table(options)
    for number, line in enumerate(lines):
        print(f"| {' | '.join(line)} |", flush=True)
        if number == 0:
            print(f"|{' --- |' * len(line)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
