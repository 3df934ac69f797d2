"""What our sources take from vLLM."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from surface.listed import Ref, Type
from surface.tree import Signature


@dataclass
class OwnClass:
    """A class of ours; ``names`` are its methods, fields and attributes set on ``self``."""

    name: str
    bases: frozenset[Ref] = frozenset()
    methods: set[str] = field(default_factory=set)
    types: dict[str, Type] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class OwnFunction:
    """A function or method of ours; without ``self`` and ``cls``."""

    name: str
    signature: Signature


@dataclass
class Uses:
    """Everything found; values say where."""

    names: dict[tuple[str, str], str] = field(default_factory=dict)  # module, name
    members: dict[tuple[str, str, str], str] = field(default_factory=dict)  # and attribute
    calls: dict[tuple[str, str, str, Signature], str] = field(default_factory=dict)
    super_calls: dict[tuple[str, str, str, Signature], str] = field(default_factory=dict)
    strings: dict[str, str] = field(default_factory=dict)
    functions: list[OwnFunction] = field(default_factory=list)
    classes: dict[tuple[str, str], OwnClass] = field(default_factory=dict)
    results: dict[tuple[str, str], Type] = field(default_factory=dict)  # of our functions

    def vllm_bases(self, own: OwnClass) -> set[Ref]:
        """vLLM's classes that ``own`` extends, directly or over classes of ours."""
        bases: set[Ref] = set()
        for base in own.bases:
            parent = self.classes.get((base.module, base.name))
            bases |= self.vllm_bases(parent) if parent else {base}
        return {base for base in bases if base.module.split(".")[0] == "vllm"}


def call_shape(call: ast.Call) -> Signature:
    """How a call passes its arguments; the positional ones have no names yet."""
    positional = [a for a in call.args if not isinstance(a, ast.Starred)]
    keywords = [k.arg for k in call.keywords]
    return Signature(
        positional=("",) * len(positional),
        keyword_only=tuple(sorted(name for name in keywords if name)),
        star=len(positional) < len(call.args),
        double_star=None in keywords,
    )


def shape(signature: Signature) -> Signature:
    """A listed call in the form of ``call_shape``."""
    return Signature(
        positional=("",) * len(signature.by_position),
        keyword_only=tuple(sorted(signature.by_keyword)),
        star=signature.star,
        double_star=signature.double_star,
    )
