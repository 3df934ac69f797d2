"""Random traces through FusedStepScheduler and stock's scheduler: same answers, no leak.

    cd tests && python -m scheduler.simulate --requests 10000 --seed 1

    cd tests && python -m scheduler.simulate --requests 10000 --seed 1 --drafts

Prints what was compared; the exit code is 1 if anything differs. ``--drafts``: speculative rounds,
which give each request one token and as many more as drafts hold.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import dataclass, field
from random import Random

from scheduler.engine import Engine
from scheduler.trace import Trace, expected, make_trace, make_trace_with_drafts
from scheduler.watched import Watched
from scheduler.world import STOCK

from fusedstep.policy import MAX_STEPS

# Steps that a request may wait because others hold blocks ahead: two windows, used up.
LONGEST_WAIT = 3 * MAX_STEPS


@dataclass
class Comparison:
    """One trace, or the sum of many."""

    requests: int = 0
    differences: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # what stock would not have done there
    preemptions: int = 0
    stock_preemptions: int = 0
    preempting_traces: int = 0  # without a preemption in stock
    calm_traces: int = 0  # without a preemption in stock
    turns: int = 0
    stock_turns: int = 0
    steps: int = 0
    stock_steps: int = 0
    first_tokens: list[int] = field(default_factory=list)  # steps later than stock's
    waits: list[float] = field(default_factory=list)  # longest for blocks held ahead, in steps
    counted: int = 0  # requests whose drafts were compared, round by round
    summed: int = 0  # rounds in traces whose statistics were compared

    def __iadd__(self, other: Comparison) -> Comparison:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def problems(self) -> list[str]:
        return self.differences + self.leaks + self.faults


def compare(trace: Trace) -> Comparison:
    """Run both schedulers. A run that breaks down is a difference of all its requests."""
    ours = Engine(trace, Watched, trace.decode_steps)
    stock = Engine(trace.with_ids_of_their_own(), STOCK[trace.asynchronous])
    found = Comparison(requests=len(trace.specs))
    for engine in (ours, stock):
        free = engine.num_free_blocks
        engine.run()
        if engine.num_free_blocks != free:
            found.leaks.append(f"{engine.num_free_blocks} of {free} blocks are free")
        left = [*engine.scheduler.requests, *engine.scheduler.running]
        found.leaks += [f"request {request} is left" for request in left]
    found.leaks += left_behind(ours)
    found.faults += ours.scheduler.faults
    for n, spec in enumerate(trace.specs):
        tokens, reason = expected(spec, trace.max_model_len)
        for name, answer in (("ours", ours.answers[n]), ("stock", stock.answers[n])):
            aborted = answer.reason == "abort" and spec.aborted_after is not None
            want = (tokens[: len(answer.tokens)], "abort") if aborted else (tokens, reason)
            if (answer.tokens, answer.reason) != want:
                have = f"{answer.tokens} {answer.reason}"
                found.differences.append(f"request {n}, {name}: {have}, not {want}")
        first, stock_first = ours.answers[n].first_at, stock.answers[n].first_at
        if first is not None and stock_first is not None:
            found.first_tokens.append(first - stock_first)
    if trace.num_drafts:
        _compare_drafts(trace, ours, stock, found)
    found.waits = [ours.scheduler.longest_wait * 1000 / trace.step_ms]
    if found.waits[0] > LONGEST_WAIT:
        found.faults.append(f"a request waited {found.waits[0]:.0f} steps for blocks held ahead")
    found.preemptions = ours.preemptions
    found.stock_preemptions = stock.preemptions
    found.calm_traces = int(not stock.preemptions)
    found.preempting_traces = int(not stock.preemptions and ours.preemptions > 0)
    found.turns, found.stock_turns = ours.turns, stock.turns
    found.steps, found.stock_steps = ours.steps, stock.steps
    return found


def _compare_drafts(trace: Trace, ours: Engine, stock: Engine, found: Comparison) -> None:
    """Drafts of each round, where nothing but the request decides how many there are."""
    counts = ours.scheduler.counts
    if (counts.drafts, counts.accepted_drafts) != (ours.drafts["drafts"], ours.drafts["held"]):
        found.differences.append(f"{counts.drafts} drafts counted, not {ours.drafts['drafts']}")
    all_compared = True
    for n, (spec, our, other) in enumerate(
        zip(trace.specs, ours.answers, stock.answers, strict=True)
    ):
        end = len(spec.prompt) + spec.max_tokens + 2 * (1 + trace.num_drafts)
        is_cut = spec.aborted_after is not None or spec.stop_string is not None
        if our.is_odd or other.is_odd or is_cut or end > trace.max_model_len:
            all_compared = False
            continue
        found.counted += 1
        if our.drafts != other.drafts:
            found.differences.append(f"request {n}: drafts {our.drafts}, not {other.drafts}")
    if all_compared:
        found.summed += stock.drafts["rounds"]
        if ours.drafts != stock.drafts:
            found.differences.append(f"statistics {ours.drafts}, not {stock.drafts}")


def left_behind(engine: Engine) -> list[str]:
    """What FusedStepScheduler itself keeps of requests, when there is none any more."""
    scheduler = engine.scheduler
    kept = {
        "reasons": scheduler.stock_reasons,
        "outside the door": scheduler.door.outside,
        "a window in flight": scheduler.in_flight.has_window,
        "rounds": scheduler.rounds and (scheduler.rounds.given or scheduler.rounds.asked),
    }
    return [f"{what} is left" for what, value in kept.items() if value]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drafts", action="store_true")
    given = parser.parse_args()
    make = make_trace_with_drafts if given.drafts else make_trace
    logging.disable(logging.WARNING)
    total, start, seed = Comparison(), time.monotonic(), given.seed
    while total.requests < given.requests:
        random = Random(seed)
        trace = make(random, min(random.randint(1, 60), given.requests - total.requests))
        try:
            found = compare(trace)
        except Exception as error:
            found = Comparison(requests=len(trace.specs), differences=[repr(error)])
        for problem in found.problems:
            print(f"seed {seed}: {problem}", file=sys.stderr)
        total += found
        seed += 1
    seconds = time.monotonic() - start
    print(
        f"{total.requests} requests in {seed - given.seed} traces, {seconds:.0f} s: "
        f"{len(total.differences)} differences, {len(total.leaks)} leaks, "
        f"{len(total.faults)} things that stock would not have done"
    )
    later = sorted(total.first_tokens)
    print(
        f"preemptions {total.preemptions}, stock {total.stock_preemptions}; "
        f"in {total.preempting_traces} of {total.calm_traces} traces where stock had none\n"
        f"turns {total.turns}, stock {total.stock_turns}; "
        f"steps {total.steps}, stock {total.stock_steps}\n"
        f"first token later than stock's by {sum(later) / len(later):.1f} steps on average, "
        f"{later[len(later) // 2]} p50, {later[len(later) * 99 // 100]} p99, {later[-1]} at most\n"
        f"waits for blocks held ahead: at most {max(total.waits):.0f} steps"
    )
    if given.drafts:
        print(
            f"drafts of {total.counted} requests compared, round by round; statistics of "
            f"{total.summed} rounds, in traces where nothing cut drafts short"
        )
    return int(bool(total.problems))


if __name__ == "__main__":
    sys.exit(main())
