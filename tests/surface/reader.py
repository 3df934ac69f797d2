"""Reads our modules: what they take from vLLM."""

from __future__ import annotations

import ast

from surface.inference import Inference, merged
from surface.listed import UNKNOWN, Ref
from surface.tree import FUNCTIONS, Signature, assigned
from surface.uses import OwnClass, OwnFunction, Uses

PASSES = 3  # types found in one module lead on in others


class Reader(Inference):
    """Statements of a module, or of the body of a class or function."""

    def block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Import() | ast.ImportFrom():
                self.imported(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.function(node)
            case ast.ClassDef():
                self.klass(node)
            case ast.Assign():
                found = self.infer(node.value)
                for target in node.targets:
                    self.bind(target, found)
            case ast.AnnAssign():
                found = self.annotation(node.annotation)
                value = UNKNOWN if node.value is None else self.infer(node.value)
                self.bind(node.target, found or value or self.hint(node.target))
            case ast.Return(value=ast.expr() as value):
                self.returned = merged(self.returned, self.infer(value))
            case ast.For() | ast.AsyncFor():
                self.bind(node.target, self.infer(node.iter))
                self.block(node.body + node.orelse)
            case _:
                for child in ast.iter_child_nodes(node):
                    self.child(child)

    def child(self, node: ast.AST) -> None:
        match node:
            case ast.stmt():
                self.statement(node)
            case ast.withitem(optional_vars=ast.expr() as target):
                self.bind(target, self.infer(node.context_expr))
            case _:
                super().child(node)

    def imported(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                found = self.named(node.module or "", alias.name, node)
                name = alias.asname or alias.name
                self.env[name] = merged(self.env.get(name, UNKNOWN), found)
            elif alias.name.split(".")[0] == "vllm":
                assert alias.asname is None, "not understood: import vllm... as"
                self.uses.names.setdefault((alias.name, ""), self.place(node))
                self.env["vllm"] = frozenset({Ref("module", "vllm")})

    def klass(self, node: ast.ClassDef) -> None:
        own = self.uses.classes.setdefault((self.module, node.name), OwnClass(node.name))
        bases = [self.infer(base) for base in node.bases]
        own.bases = frozenset(ref for base in bases if isinstance(base, frozenset) for ref in base)
        self.env[node.name] = frozenset({Ref("object", self.module, node.name)})
        for statement in node.body:
            if isinstance(statement, FUNCTIONS):
                own.methods.add(statement.name)
                own.names.add(statement.name)
            for target in assigned(statement):
                if isinstance(target, ast.Name):
                    own.names.add(target.id)
                if isinstance(target, ast.Name) and isinstance(statement, ast.AnnAssign):
                    found = self.annotation(statement.annotation) or self.hint(target)
                    own.types[target.id] = found
        Reader(self.uses, self.module, self.env, own).block(node.body)

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bound = bool(arguments) and arguments[0].arg in ("self", "cls")
        self.uses.functions.append(OwnFunction(node.name, Signature.of(node.args, bound=bound)))
        reader = Reader(self.uses, self.module, self.env, self.own)
        for a in arguments:
            hint = self.hint(ast.Name(a.arg))
            reader.env[a.arg] = self.annotation(a.annotation) or hint
        if self.own is not None and bound:
            me = frozenset({Ref("instance", self.module, self.own.name)})
            reader.env[arguments[0].arg] = me
        else:
            self.env[node.name] = frozenset({Ref("object", self.module, node.name)})
        for decorator in node.decorator_list:
            self.infer(decorator)
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.infer(default)
        reader.block(node.body)
        result = self.annotation(node.returns) or reader.returned
        if self.own is not None and bound:
            self.own.types[node.name] = result
        else:
            self.uses.results[self.module, node.name] = result


def scan(sources: dict[str, str]) -> Uses:
    """Read modules, given as import name and text."""
    uses = Uses()
    for _ in range(PASSES):
        uses = Uses(classes=uses.classes, results=uses.results)
        for module, text in sources.items():
            Reader(uses, module).block(ast.parse(text).body)
    return uses
