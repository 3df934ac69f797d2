"""Traces for the scheduler simulator: what arrives when, on which engine, and what must come out.

``make_trace`` draws everything from one ``random.Random``; hypothesis has one that it can shrink.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

VOCABULARY = 60
EOS = 0


@dataclass(frozen=True)
class Spec:
    """One request. Times are device steps since the start."""

    prompt: tuple[int, ...]
    arrives: int
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop_string: int | None = None  # a token that only the client recognizes, and then aborts
    aborted_after: int | None = None  # steps after its arrival
    priority: int = 0
    streams: bool = False
    reuses: int | None = None  # number of an earlier, aborted request whose id it takes


@dataclass(frozen=True)
class Trace:
    """An engine and its requests."""

    specs: tuple[Spec, ...]
    block_size: int = 4
    num_blocks: int = 1000
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    max_model_len: int = 96
    sliding_window: bool = False  # a second KV-cache group, of a sliding window
    states: bool = False  # a KV-cache group of recurrent states, cached with the prefixes if any
    checkpoints: bool = False  # a prefill writes the state at its last block's beginning, too
    prefix_caching: bool = True
    by_priority: bool = False
    asynchronous: bool = True
    decode_steps: str = "auto"
    latency_ms: float = 50.0
    step_ms: float = 1.0
    lag: int = 0  # steps that the host needs for a turn; the device goes on with what is queued
    cut: float = 0.0  # probability that a window ends after any of its steps
    gives_way: float = 1.0  # that it ends before its first, if a request has come
    seed: int = field(default=0, compare=False)  # of the two above
    num_drafts: int = 0  # of a speculative round; 0: none
    draft_model: bool = False  # the drafter has a KV cache, and asks for blocks and places

    def name(self, number: int) -> str:
        """The request's id."""
        before = self.specs[number].reuses
        return str(number) if before is None else self.name(before)

    def num_held(self, number: int, position: int, num_drafts: int) -> int:
        """Of so many drafts behind a request's token at this position, those that hold."""
        value = next_hash(number, 0, position, 1)
        usual = (0, self.num_drafts, value, value)[number % 4] % (self.num_drafts + 1)
        return min(usual if value % 7 else value // 7 % (self.num_drafts + 1), num_drafts)

    def with_states(self, checkpoints: bool) -> Trace:
        """A hybrid model: as many blocks more as a request's states may take."""
        return replace(self, states=True, checkpoints=checkpoints, num_blocks=self.num_blocks + 4)

    def with_ids_of_their_own(self) -> Trace:
        """The same requests; none takes the id of another."""
        return replace(self, specs=tuple(replace(spec, reuses=None) for spec in self.specs))


def next_hash(before: int, half: int, position: int, token: int) -> int:
    """What the KV cache holds at a position: it depends on every token up to there."""
    return hash((before, half, position, token))


def next_token(value: int, spec: Spec, num_output_tokens: int) -> int:
    """The token after the position that holds ``value``. Stops are masked below min_tokens."""
    token = value % VOCABULARY
    if num_output_tokens < spec.min_tokens:
        while token == EOS or token in spec.stop_token_ids:
            token = (token + 1) % VOCABULARY
    return token


def device_stop(spec: Spec, max_model_len: int, output: list[int]) -> str | None:
    """The finish reason that the device knows of, or None."""
    if (output[-1] == EOS and not spec.ignore_eos) or output[-1] in spec.stop_token_ids:
        return "stop"
    if len(output) >= spec.max_tokens or len(spec.prompt) + len(output) >= max_model_len:
        return "length"
    return None


def expected(spec: Spec, max_model_len: int) -> tuple[list[int], str]:
    """Tokens and finish reason of a request that nobody aborts."""
    values: list[int] = []
    tokens: list[int] = []
    output: list[int] = []
    for token in spec.prompt:
        tokens.append(token)
        values.append(_value(values, token))
    while True:
        output.append(next_token(values[-1], spec, len(output)))
        if output[-1] == spec.stop_string:
            return output, "stop"
        reason = device_stop(spec, max_model_len, output)
        if reason is not None:
            return output, reason
        values.append(_value(values, output[-1]))


def _value(values: list[int], token: int) -> int:
    position = len(values)
    before = values[position - 1] if position else 0
    half = values[position // 2] if position > 1 else 0
    return next_hash(before, half, position, token)


def make_trace(random: Random, num_requests: int) -> Trace:
    """A random engine, often short of KV-cache blocks or of places, and random requests."""
    block_size = random.choice((1, 4, 16))
    max_model_len = random.choice((48, 96, 160))
    groups = random.choice((1, 1, 2))
    least = groups * -(-max_model_len // block_size) + 2
    num_blocks = least * random.choice((1, 1, 2, 3, 20)) + random.randint(0, 9)
    max_num_seqs = random.choice((1, 2, 4, 8))
    gap = random.choice((0, 2, 12, 60))
    by_priority, streams = random.random() < 0.3, random.random() < 0.4
    aborts, times = random.random() < 0.4, 0
    specs = []
    for _ in range(num_requests):
        times += random.randint(0, gap)
        specs.append(_spec(random, times, max_model_len, streams, aborts))
    for number in range(num_requests):
        after = specs[number].aborted_after
        if after is not None and random.random() < 0.6:  # at once, with the same id
            times = specs[number].arrives + after
            again = _spec(random, times, max_model_len, streams, aborts=False)
            specs.append(replace(again, reuses=number))
    trace = Trace(
        specs=tuple(specs),
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, random.choice((12, 40, 200))),
        max_model_len=max_model_len,
        sliding_window=groups == 2,
        prefix_caching=random.random() < 0.6,
        by_priority=by_priority,
        asynchronous=random.random() < 0.8,
        decode_steps=random.choice(("auto", "auto", "auto", "2", "7", "64")),
        latency_ms=random.choice((4.0, 20.0, 50.0)),
        step_ms=random.choice((0.3, 1.0, 7.0)),
        lag=random.choice((0, 0, 1, 3)),
        cut=random.choice((0.0, 0.0, 0.05, 0.3)),
        gives_way=random.choice((0.0, 0.5, 1.0, 1.0)),
        seed=random.randint(0, 1 << 30),
    )
    if random.random() < 0.4:
        return trace.with_states(checkpoints=random.random() < 0.5)
    return trace


def make_trace_with_drafts(random: Random, num_requests: int) -> Trace:
    """The same with speculative rounds. In a third of the engines nothing cuts drafts short, so
    that both schedulers must count the same drafts; a third have room in a batch for anything."""
    trace = make_trace(random, num_requests)
    num_drafts, draft_model = random.randint(1, 5), random.random() < 0.5
    least = trace.max_num_seqs * (1 + num_drafts + draft_model)
    plenty = trace.max_num_seqs * trace.max_model_len
    trace = replace(
        trace,
        states=False,
        checkpoints=False,
        num_drafts=num_drafts,
        draft_model=draft_model,
        max_num_batched_tokens=max(least, random.choice((12, 40, plenty))),
    )
    if random.random() < 0.33:
        return replace(
            trace,
            specs=tuple(_at_ease(each, trace) for each in trace.specs),
            num_blocks=2 + 2 * plenty,
            max_num_batched_tokens=plenty,
            prefix_caching=False,
        )
    return trace


def _at_ease(spec: Spec, trace: Trace) -> Spec:
    """Nobody aborts it, and it ends before its drafts get fewer."""
    most = trace.max_model_len - 2 * (1 + trace.num_drafts)
    prompt = (1, *spec.prompt)[: most // 2]
    return replace(
        spec,
        prompt=prompt,
        max_tokens=min(spec.max_tokens, most - len(prompt)),
        min_tokens=min(spec.min_tokens, most - len(prompt), spec.max_tokens),
        stop_string=None,
        aborted_after=None,
        reuses=None,
    )


def _spec(random: Random, arrives: int, max_model_len: int, streams: bool, aborts: bool) -> Spec:
    family = random.randint(0, 3)
    shared = random.choice((0, 0, 8, 20)) if family else 0
    own = random.randint(1, max_model_len // 2 - shared)
    prompt = [(family * 7 + n) % VOCABULARY for n in range(shared)]
    prompt += [random.randrange(VOCABULARY) for _ in range(own)]
    max_tokens = random.choice((1, 2, random.randint(1, 20), max_model_len))

    def choice(chance: float) -> bool:
        return random.random() < chance

    min_tokens = random.randint(0, max_tokens) if choice(0.2) else 0
    return Spec(
        prompt=tuple(prompt),
        arrives=arrives,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=choice(0.3),
        stop_token_ids=(5, 9) if choice(0.2) else (),
        stop_string=11 if choice(0.15) and not min_tokens else None,
        aborted_after=random.randint(0, 60) if aborts and choice(0.3) else None,
        priority=random.randint(0, 2),
        streams=streams and choice(0.5),
    )
