"""``tests/surface/vllm_names.py``, parsed: its docstring defines the language."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import Any

from surface.tree import Signature
from surface.vllm_names import SURFACE


@dataclass(frozen=True)
class Ref:
    """``kind``: "module", "object" (a class, a function or whatever has the name), "instance"."""

    kind: str
    module: str
    name: str = ""


Type = frozenset[Ref] | tuple["Type", ...]  # what it may be, or a tuple's elements
UNKNOWN: Type = frozenset()
NOTHING = Signature()
MARK = re.compile(r"\s*\b(since|until) (\d+\.\d+)$")


@dataclass(frozen=True)
class Item:
    """One line of an entry. ``member`` is empty for the entry's own name."""

    kind: str  # attribute, added, call, override, replaced, kernel or ignored
    member: str
    signature: Signature = NOTHING
    type_name: str = ""
    since: str = ""
    until: str = ""

    def is_for(self, version: str) -> bool:
        """Does the item hold for this version of vLLM?"""
        release = _release(version)
        return not (
            (self.since and release < _release(self.since))
            or (self.until and release >= _release(self.until))
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


@dataclass
class Entry:
    """One name of a module."""

    items: list[Item] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Item]:
        return [item for item in self.items if item.kind in kinds]

    def member(self, name: str) -> list[Item]:
        return [i for i in self.of("attribute", "added", "call", "override") if i.member == name]


def _parse(text: str) -> Entry:
    if text.startswith("kernel "):
        taken, _, without = text.removeprefix("kernel ").partition("|")
        return Entry([_item("kernel", "", f"({taken})"), _item("ignored", "", f"({without})")])
    entry = Entry()
    for line in re.sub(r"\n(?=[^()]*\))", " ", text).splitlines():  # not inside parentheses
        mark = MARK.search(" " + line)
        when: dict[str, Any] = {mark[1]: mark[2]} if mark else {}
        line = MARK.sub("", " " + line).strip()
        if line == "replaced":
            entry.items.append(Item("replaced", ""))
        elif re.match(r"(def )?\w*\(", line):
            line, _, result = line.partition(" -> ")
            kind = "override" if line.startswith("def ") else "call"
            name, _, rest = line.removeprefix("def ").partition("(")
            entry.items.append(_item(kind, name, f"({rest}", type_name=result, **when))
        else:
            kind = "added" if line.startswith("+") else "attribute"
            names, _, type_name = line.removeprefix("+").partition(":")
            entry.items += [
                Item(kind, name.strip(), type_name=type_name.strip(), **when)
                for name in names.split(",")
                if line or when
            ]
    return entry


def _item(kind: str, member: str, parameters: str, **rest: str) -> Item:
    (function,) = ast.parse(f"def f{parameters}: ...").body
    assert isinstance(function, ast.FunctionDef)
    return Item(kind, member, Signature.of(function.args), **rest)


LISTED: dict[tuple[str, str], Entry] = {
    (module, name): _parse(text)
    for module, names in SURFACE.items()
    for name, text in names.items()
}


def resolve(type_name: str) -> Type:
    """``Name`` is an instance of the listed class of that name, ``(A, B)`` a tuple."""
    if not type_name:
        return UNKNOWN
    if type_name.startswith("("):
        return tuple(resolve(part.strip()) for part in type_name.strip("()").split(","))
    found = [
        Ref("instance", module, name)
        for module, name in LISTED
        if f".{module}.{name}".endswith(f".{type_name}")
    ]
    assert len(found) == 1, f"vllm_names.py: {type_name} is {len(found)} listed names"
    return frozenset(found)


def type_of(module: str, name: str, member: str, kind: str) -> Type:
    """The listed type of an attribute, or of what a call gives (``kind``)."""
    entry = LISTED.get((module, name), Entry())
    types = [resolve(i.type_name) for i in entry.of(kind) if i.member == member and i.type_name]
    return types[0] if types else UNKNOWN
