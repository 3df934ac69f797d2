"""The types of our expressions, as far as they lead to vLLM; notes every use on the way.

Roots are imports, annotations and base classes; from there the types that ``vllm_names.py`` lists
for attributes and results lead on. A container has the type of its elements.
"""

from __future__ import annotations

import ast
from dataclasses import replace

from surface.listed import LISTED, UNKNOWN, Ref, Type, resolve, type_of
from surface.tree import Signature
from surface.uses import OwnClass, Uses, call_shape
from surface.vllm_names import SURFACE
from test_layers import MODULES

OURS = "fusedstep"
# Types of variables that are annotated with Any, or not at all: module, variable.
HINTS = {
    ("fusedstep.vllm_plugin.scheduler.door", "self"): "EngineCore",
    ("fusedstep.bench.kernels.stock_step", "output"): "gpu.sample.output.SamplerOutput",
    ("fusedstep.bench.probe", "model_runner"): "GPUModelRunner",
    ("fusedstep.bench.engine", "output"): "RequestOutput",
}
# What vLLM's parser fills.
FRONTEND = ("common.cli_args.FrontendArgs", "launchers.cli_args.FrontendArgs")
ANNOTATED = {"Namespace": ("EngineArgs", *FRONTEND)}


def merged(left: Type, right: Type) -> Type:
    if isinstance(left, tuple) or isinstance(right, tuple):
        return left or right
    return left | right


class Inference:
    """Expressions in a block of one of our modules."""

    def __init__(
        self,
        uses: Uses,
        module: str,
        env: dict[str, Type] | None = None,
        own: OwnClass | None = None,
    ) -> None:
        self.uses, self.module = uses, module
        self.env = dict(env or {})  # types of names
        self.own = own  # the class around
        self.returned = UNKNOWN

    def named(self, module: str, name: str, node: ast.AST) -> Type:
        """What ``from module import name`` gives."""
        if module.split(".")[0] not in ("vllm", OURS):
            return UNKNOWN
        if f"{module}.{name}" in (*SURFACE, *MODULES):
            return frozenset({Ref("module", f"{module}.{name}")})
        if module.split(".")[0] == "vllm":
            self.uses.names.setdefault((module, name), self.place(node))
            return type_of(module, name, "", "attribute") or frozenset(
                {Ref("object", module, name)}
            )
        return frozenset({Ref("object", module, name)})

    def hint(self, target: ast.expr) -> Type:
        name = target.id if isinstance(target, ast.Name) else ""
        return resolve(HINTS.get((self.module, name), ""))

    def annotation(self, node: ast.expr | None) -> Type:
        match node:
            case ast.Constant(value=str() as text):
                return self.annotation(ast.parse(text, mode="eval").body)
            case ast.Name(id=name) if name in ANNOTATED:
                found = UNKNOWN
                for type_name in ANNOTATED[name]:
                    found = merged(found, resolve(type_name))
                return found
            case ast.Name() | ast.Attribute():
                found = self.infer(node)
                assert isinstance(found, frozenset)
                return frozenset(replace(r, kind="instance") for r in found if r.kind == "object")
            case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=elements)):
                if not (isinstance(elements[-1], ast.Constant) and elements[-1].value is ...):
                    return tuple(self.annotation(element) for element in elements)
                return self.annotation(elements[0])
            case ast.Subscript(value=ast.Name(id="Callable")):
                return UNKNOWN
            case ast.BinOp() | ast.Subscript() | ast.Tuple():
                found = UNKNOWN
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.expr):
                        found = merged(found, self.annotation(child))
                return found
        return UNKNOWN

    def lists(self, ref: Ref, member: str) -> bool:
        entry = LISTED.get((ref.module, ref.name))
        return entry is not None and bool(entry.member(member))

    def bind(self, target: ast.expr, found: Type) -> None:
        match target:
            case ast.Name(id=name):
                self.env[name] = found
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                pairs = found if isinstance(found, tuple) else (found,) * len(targets)
                if len(pairs) != len(targets):
                    pairs = (UNKNOWN,) * len(targets)
                for each, part in zip(targets, pairs, strict=True):
                    self.bind(each, part)
            case ast.Attribute(value=ast.Name(id="self"), attr=attr) if self.own is not None:
                bases = self.uses.vllm_bases(self.own)
                if any(self.lists(base, attr) for base in bases):
                    self.infer(target)
                else:
                    self.own.names.add(attr)
                    self.own.types[attr] = merged(self.own.types.get(attr, UNKNOWN), found)
            case _:
                self.infer(target)

    def infer(self, node: ast.expr) -> Type:
        match node:
            case ast.Name(id=name):
                return self.env.get(name, UNKNOWN)
            case ast.Constant(value=str() as text):
                self.uses.strings.setdefault(text, self.place(node))
            case ast.Attribute(value=value, attr=attr):
                return self.attribute(self.infer(value), attr, node)
            case ast.Call():
                return self.call(node)
            case ast.Tuple(elts=elements):
                return tuple(self.infer(element) for element in elements)
            case ast.Subscript(value=value, slice=index):
                self.infer(index)
                found = self.infer(value)
                match found, index:
                    case tuple(), ast.Constant(value=int() as place) if place < len(found):
                        return found[place]
                return found
            case ast.NamedExpr(target=target, value=value):
                self.env[target.id] = self.infer(value)
                return self.env[target.id]
            case ast.BoolOp(values=values) | ast.List(elts=values) | ast.Set(elts=values):
                return self.union(values)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self.infer(test)
                return self.union([body, orelse])
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                for generator in node.generators:
                    self.bind(generator.target, self.infer(generator.iter))
                    for condition in generator.ifs:
                        self.infer(condition)
                if isinstance(node, ast.DictComp):
                    self.infer(node.key)
                    return self.infer(node.value)
                return self.infer(node.elt)
            case _:
                for child in ast.iter_child_nodes(node):
                    self.child(child)
        return UNKNOWN

    def union(self, nodes: list[ast.expr]) -> Type:
        found = UNKNOWN
        for node in nodes:
            found = merged(found, self.infer(node))
        return found

    def call(self, node: ast.Call) -> Type:
        arguments = [self.infer(argument) for argument in node.args]
        for keyword in node.keywords:
            self.infer(keyword.value)
        first = arguments[0] if arguments else UNKNOWN
        match node.func:
            case ast.Name(id="super"):
                assert self.own is not None
                bases = self.uses.vllm_bases(self.own)
                return frozenset(Ref("super", base.module, base.name) for base in bases)
            case ast.Name(id="zip"):
                return tuple(arguments)
            case ast.Name(id="enumerate"):
                return (UNKNOWN, first)
            case ast.Name(id="next" | "iter" | "list" | "tuple" | "reversed" | "sorted" | "min"):
                return first
            case ast.Name(id="getattr"):
                match node.args[1]:
                    case ast.Constant(value=str() as attr):
                        return self.attribute(first, attr, node)
                return UNKNOWN
            case ast.Name(id="replace"):
                for keyword in node.keywords:
                    self.attribute(first, keyword.arg or "", node)
                return first
            case ast.Name(id="partial"):
                inner = ast.Call(node.args[0], [*node.args[1:], ast.Starred(node)], node.keywords)
                return self.result(node.args[0], call_shape(inner), node)
        return self.result(node.func, call_shape(node), node)

    def result(self, function: ast.expr, arguments: Signature, node: ast.expr) -> Type:
        """What a call gives; notes the call."""
        if isinstance(function, ast.Attribute):
            return self.attribute(self.infer(function.value), function.attr, node, arguments)
        return self.called_on(self.infer(function), arguments, node)

    def called_on(self, refs: Type, arguments: Signature, node: ast.expr) -> Type:
        found = UNKNOWN
        for ref in refs if isinstance(refs, frozenset) else ():
            if ref.kind == "object":
                found = merged(found, self.called(ref, "", arguments, node))
            elif ref.kind == "instance":
                found = merged(found, self.attribute(refs, "__call__", node, arguments))
        return found

    def called(self, ref: Ref, member: str, arguments: Signature, node: ast.expr) -> Type:
        if ref.module.split(".")[0] == "vllm":
            key = (ref.module, ref.name, member, arguments)
            self.uses.calls.setdefault(key, self.place(node))
            found = type_of(ref.module, ref.name, member, "call")
        else:
            found = self.uses.results.get((ref.module, ref.name), UNKNOWN)
        if not found and not member and ref.name.lstrip("_")[:1].isupper():
            return frozenset({replace(ref, kind="instance")})
        return found

    def attribute(
        self, refs: Type, name: str, node: ast.expr, arguments: Signature | None = None
    ) -> Type:
        """What an attribute, or with ``arguments`` a call of it, gives; notes the use."""
        found: Type = UNKNOWN
        vllm: list[Ref] = []
        for ref in refs if isinstance(refs, frozenset) else ():
            own = self.uses.classes.get((ref.module, ref.name))
            if ref.kind == "module":
                target = self.named(ref.module, name, node)
                if arguments is not None and isinstance(target, frozenset):
                    for each in target:
                        target = self.called(each, "", arguments, node)
                found = merged(found, target)
            elif ref.kind == "super" and arguments is not None:
                key = (ref.module, ref.name, name, arguments)
                self.uses.super_calls.setdefault(key, self.place(node))
                found = merged(found, type_of(ref.module, ref.name, name, "override"))
            elif own is None:
                vllm += [ref] if ref.module.split(".")[0] == "vllm" else []
            elif (holder := self.holder(own, name)) is not None:
                found = merged(found, holder.types.get(name, UNKNOWN))
                if arguments is None or name in holder.methods:
                    return found
                return self.called_on(found, arguments, node)
            else:
                vllm += self.uses.vllm_bases(own)
        for ref in [ref for ref in vllm if self.lists(ref, name)] or vllm[:1]:
            if arguments is None:
                self.uses.members.setdefault((ref.module, ref.name, name), self.place(node))
                found = merged(found, type_of(ref.module, ref.name, name, "attribute"))
            else:
                found = merged(found, self.called(ref, name, arguments, node))
        return found

    def holder(self, own: OwnClass, name: str) -> OwnClass | None:
        """The class of ours that has the name: ``own`` or a base of it."""
        if name in own.names:
            return own
        parents = [self.uses.classes.get((base.module, base.name)) for base in own.bases]
        found = (self.holder(parent, name) for parent in parents if parent is not None)
        return next((holder for holder in found if holder is not None), None)

    def place(self, node: ast.AST) -> str:
        return f"{self.module}, line {getattr(node, 'lineno', 0)}"

    def child(self, node: ast.AST) -> None:
        """Anything inside an expression or a statement."""
        if isinstance(node, ast.expr):
            self.infer(node)
        else:
            for child in ast.iter_child_nodes(node):
                self.child(child)
