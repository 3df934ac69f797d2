"""Memory order in compiled kernels: what a release may miss, what is loaded before an acquire.

Reads PTX and amdgcn (gfx9) and follows every path through them. At an atomic that releases, no
store of the program may be later than its last barrier; and on gfx9 none may be in flight at that
barrier, because neither the barrier nor the release waits for the stores of other waves. After an
atomic that acquires, nothing may be loaded from global memory before the next barrier.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

# A label, a source line (0: unknown, which the one before is better than), or an instruction that
# may matter here, by the beginning of its name.
RELEVANT = re.compile(
    r"""^(?:
    (?P<label>[$.]\w+):
    | \s*\.loc\s.*?(?://|;)\ (?P<source>\w+\.py:[1-9]\d*)
    | \s*(?P<guard>@!?%\w+\ )?
      (?P<name>(?:st|ld|cp\.async|atom|red|bar|bra|ret|exit|brx|call  # PTX
                |global_|buffer_|flat_|s_barrier|s_waitcnt|s_branch|s_cbranch|s_endpgm|s_setpc
                |s_swappc)[\w.:]*)
      (?P<rest>.*)
    )""",
    re.MULTILINE | re.VERBOSE,
)


@dataclass(frozen=True)
class Instruction:
    """What matters here of one instruction."""

    kind: str  # store, load, barrier, wait, release, acquire, atomic, jump, end
    source: str  # file:line
    target: str = ""  # of a jump
    falls_through: bool = True


@dataclass(frozen=True)
class State:
    """What may be true of a program's threads on some path to an instruction."""

    since_barrier: frozenset[str] = frozenset()  # stores
    in_flight: frozenset[str] = frozenset()  # stores that their wave has not waited for
    at_barrier: frozenset[str] = frozenset()  # those that were in flight at the last barrier
    acquired: frozenset[str] = frozenset()  # atomics that acquired, since the last barrier

    def joined(self, other: State) -> State:
        return State(
            *(a | b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def _kinds_of_ptx(name: str) -> list[str]:
    parts = name.replace("::", ".").split(".")
    if parts[0] in ("atom", "red"):
        orders = {"acquire": ["acquire"], "release": ["release"], "acq_rel": ["release", "acquire"]}
        return next((orders[part] for part in parts if part in orders), ["atomic"])
    if parts[0] in ("bar", "barrier"):
        return ["barrier"]
    on_chip = {"shared", "param", "local"} & set(parts[1:3])
    if parts[0] == "st" and not on_chip:
        return ["store"]
    is_copy = parts[:2] == ["cp", "async"] and "global" in parts
    return ["load"] if is_copy or (parts[0] == "ld" and not on_chip) else []


def _kinds_of_amdgcn(name: str, rest: str) -> list[str]:
    if name == "s_barrier":
        return ["barrier"]
    if name == "s_waitcnt" and re.search(r"\bvmcnt\(0\)", rest):
        return ["wait"]
    if name == "buffer_wbl2":
        return ["release"]
    if name == "buffer_inv":
        return ["acquire"]
    if re.match(r"(global|buffer|flat)_atomic_", name):
        return ["atomic"]
    match = re.match(r"(global|buffer|flat)_(load|store)_", name)
    return [match[2]] if match else []


def parse(assembly: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions and, by label, which of them is the first after it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = "?"
    for match in RELEVANT.finditer(assembly):
        if match["source"]:
            source = match["source"]
        elif match["label"]:
            labels[match["label"]] = len(instructions)
        else:
            instructions += _instructions(match, source)
    return instructions, labels


def _instructions(match: re.Match[str], source: str) -> Iterator[Instruction]:
    name, rest = match["name"], match["rest"]
    if name in ("ret", "exit", "s_endpgm"):
        yield Instruction("end", source, falls_through=bool(match["guard"]))
    elif name.split(".")[0] == "bra" or re.match(r"s_c?branch", name):
        conditional = bool(match["guard"]) or name.startswith("s_cbranch")
        target = rest.split()[0].rstrip(";")
        yield Instruction("jump", source, target, falls_through=conditional)
    elif name.startswith(("brx", "call", "s_setpc", "s_swappc")):
        raise NotImplementedError(f"{name}: cannot follow it")
    else:
        for kind in _kinds_of_ptx(name) or _kinds_of_amdgcn(name, rest):
            yield Instruction(kind, source)


@dataclass(frozen=True)
class Order:
    """What there is to say of a kernel's memory order."""

    releases: int  # atomics that release
    disorders: list[str]  # what is wrong, one line each


def order_of(assembly: str) -> Order:
    """Follow every path from the kernel's entry until nothing new can be true anywhere."""
    is_gfx9 = "amdgcn_target" in assembly
    instructions, labels = parse(assembly)
    states: dict[int, State] = {0: State()}
    found: set[str] = set()
    work = [0]
    while work:
        at = work.pop()
        if at >= len(instructions):
            continue
        instruction, before = instructions[at], states[at]
        found |= _wrong(instruction, before)
        after = _after(instruction, before, is_gfx9)
        following = [at + 1] * instruction.falls_through
        if instruction.target:
            following.append(labels[instruction.target])
        for place in following:
            known = states.get(place)
            joined = after if known is None else known.joined(after)
            if joined != known:
                states[place] = joined
                work.append(place)
    releases = sum(instruction.kind == "release" for instruction in instructions)
    return Order(releases, sorted(found))


def _wrong(instruction: Instruction, state: State) -> set[str]:
    here = instruction.source
    if instruction.kind == "release":
        late = {
            f"{store}: no barrier before the release at {here}" for store in state.since_barrier
        }
        flying = state.at_barrier - state.since_barrier
        return late | {
            f"{store}: not waited for at the barrier before the release at {here}"
            for store in flying
        }
    if instruction.kind == "load":
        return {f"{here}: load before the barrier after {atomic}" for atomic in state.acquired}
    return set()


def _after(instruction: Instruction, state: State, is_gfx9: bool) -> State:
    here = frozenset([instruction.source])
    match instruction.kind:
        case "store":
            return replace(
                state,
                since_barrier=state.since_barrier | here,
                in_flight=state.in_flight | here if is_gfx9 else state.in_flight,
            )
        case "wait":
            return replace(state, in_flight=frozenset())
        case "barrier":
            return State(in_flight=state.in_flight, at_barrier=state.in_flight)
        case "acquire":
            return replace(state, acquired=state.acquired | here)
        case _:
            return state
