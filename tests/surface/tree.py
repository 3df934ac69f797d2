"""A tree of Python sources, read by AST: what is in a module, in a class, and how it is called."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import resolve_name

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FIELD_MAKERS = ("dataclass", "config", "NamedTuple", "Struct")  # the fields are the parameters


@dataclass(frozen=True)
class Signature:
    """Parameters of a function, or the arguments of a call: then ``defaults`` go by keyword."""

    positional: tuple[str, ...] = ()
    defaults: frozenset[str] = frozenset()  # of positional and keyword_only
    keyword_only: tuple[str, ...] = ()
    star: bool = False
    double_star: bool = False

    @classmethod
    def of(cls, arguments: ast.arguments, *, bound: bool = False) -> Signature:
        """``bound``: without the first parameter, ``self`` or ``cls``."""
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        with_default = names[len(names) - len(arguments.defaults) :]
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            with_default += [a.arg] if default is not None else []
        return cls(
            tuple(names[bound:]),
            frozenset(with_default),
            tuple(a.arg for a in arguments.kwonlyargs),
            arguments.vararg is not None,
            arguments.kwarg is not None,
        )

    @property
    def by_keyword(self) -> frozenset[str]:
        """Of a call: what it passes by keyword."""
        return self.defaults | set(self.keyword_only)

    @property
    def by_position(self) -> tuple[str, ...]:
        """Of a call: what it passes by position."""
        return tuple(name for name in self.positional if name not in self.defaults)

    def why_not_called_with(self, call: Signature) -> Iterator[str]:
        """What is wrong with calling a function of these parameters in this way."""
        for place, name in enumerate(call.by_position):
            if place < len(self.positional):
                if name not in ("", self.positional[place]):
                    yield f"parameter {place + 1} is '{self.positional[place]}', we pass '{name}'"
            elif not self.star:
                yield f"takes {len(self.positional)} arguments by position, we pass more"
                break
        names = {*self.positional[len(call.by_position) :], *self.keyword_only}
        for name in sorted(call.by_keyword - names):
            if not self.double_star:
                yield f"has no parameter '{name}'"
        if not call.star and not call.double_star:
            for name in (*self.positional[len(call.by_position) :], *self.keyword_only):
                if name not in self.defaults | call.by_keyword:
                    yield f"needs '{name}', which we do not pass"

    def why_not_overridden_by(self, ours: Signature) -> Iterator[str]:
        """What is wrong with an override of these parameters, for callers that know only vLLM."""
        for place, name in enumerate(self.positional):
            if place < len(ours.positional):
                if name != ours.positional[place]:
                    yield f"parameter {place + 1} is '{name}', our override's '" + (
                        f"{ours.positional[place]}'"
                    )
            elif not (ours.star and ours.double_star):
                yield f"has a parameter '{name}', which our override does not take"
        for name in self.keyword_only:
            if name not in (*ours.positional, *ours.keyword_only) and not ours.double_star:
                yield f"has a parameter '{name}', which our override does not take"
        if self.star > ours.star or self.double_star > ours.double_star:
            yield "takes any further arguments, our override does not"


@dataclass(frozen=True)
class Definition:
    """What a name stands for: a statement of a module, or a whole module (``node`` is its tree)."""

    module: str
    node: ast.AST

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)


@dataclass
class Module:
    """Top-level names of a module; those that are imported as (module, name)."""

    text: str
    tree: ast.Module
    names: dict[str, ast.AST] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a body and the ``if``, ``try`` and ``with`` blocks in it; not of functions and classes."""
    for statement in body:
        yield statement
        if not isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
            for block in ("body", "orelse", "finalbody"):
                yield from statements(getattr(statement, block, []))
            for handler in getattr(statement, "handlers", []):
                yield from statements(handler.body)


def assigned(statement: ast.stmt) -> Iterator[ast.expr]:
    """The single targets of an assignment."""
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = list(statement.targets)
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        targets = [statement.target]
    for target in targets:
        yield from target.elts if isinstance(target, (ast.Tuple, ast.List)) else (target,)


class Tree:
    """Modules by import name; ``read`` gives a file's text by path, None where there is none."""

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self.read = read
        self.modules: dict[str, Module | None] = {}
        self.classes: dict[Definition, dict[str, Definition]] = {}

    def module(self, name: str) -> Module | None:
        if name not in self.modules:
            self.modules[name] = self._load(name)
        return self.modules[name]

    def _load(self, name: str) -> Module | None:
        path = name.replace(".", "/")
        text, package = self.read(f"{path}.py"), name.rpartition(".")[0]
        if text is None:
            text, package = self.read(f"{path}/__init__.py"), name
        if text is None:
            return None
        module = Module(text, ast.parse(text))
        for statement in statements(module.tree.body):
            if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
                module.names.setdefault(statement.name, statement)
            elif isinstance(statement, ast.ImportFrom):
                base = "." * statement.level + (statement.module or "")
                base = resolve_name(base, package)
                for alias in statement.names:
                    module.imports.setdefault(alias.asname or alias.name, (base, alias.name))
            elif isinstance(statement, ast.Import):
                for alias in statement.names:
                    whole = alias.name if alias.asname else alias.name.partition(".")[0]
                    module.imports.setdefault(alias.asname or whole, (whole, ""))
            for target in assigned(statement):
                if isinstance(target, ast.Name):
                    module.names.setdefault(target.id, statement)
        return module

    def find(self, module_name: str, name: str) -> Definition | None:
        """The definition of ``module_name.name``, through imports; None if there is none."""
        module = self.module(module_name)
        if module is None:
            return None
        if not name:
            return Definition(module_name, module.tree)
        if name in module.names:
            return Definition(module_name, module.names[name])
        submodule = self.module(f"{module_name}.{name}")
        if submodule is not None:
            return Definition(f"{module_name}.{name}", submodule.tree)
        if name in module.imports:
            return self.find(*module.imports[name])
        return None

    def is_bound(self, module_name: str, name: str) -> bool:
        """Is there such a name in the module, of whatever origin?"""
        module = self.module(module_name)
        if module is None:
            return False
        if hasattr(builtins, name) and f"{name}(" in module.text:
            return True
        return name in module.imports or self.find(module_name, name) is not None

    def ancestry(self, definition: Definition) -> list[Definition]:
        """A class and the bases of it that are in the tree, nearest first."""
        classes = [definition]
        assert isinstance(definition.node, ast.ClassDef)
        for base in definition.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            owner, _, name = ast.unparse(base).rpartition(".")
            module = self.module(definition.module)
            assert module is not None
            where = module.imports.get(owner, (owner, ""))[0] if owner else definition.module
            found = self.find(where, name)
            if found is not None and found.is_class and found not in classes:
                classes += [c for c in self.ancestry(found) if c not in classes]
        return classes

    def members(self, definition: Definition) -> dict[str, Definition]:
        """Methods, fields and attributes set on ``self``, of a class and its bases."""
        if definition not in self.classes:
            self.classes[definition] = self._members(definition)
        return self.classes[definition]

    def _members(self, definition: Definition) -> dict[str, Definition]:
        members: dict[str, Definition] = {}
        for owner in self.ancestry(definition):
            own: dict[str, Definition] = {}
            assert isinstance(owner.node, ast.ClassDef)
            for statement in statements(owner.node.body):
                if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
                    own.setdefault(statement.name, Definition(owner.module, statement))
                for target in assigned(statement):
                    if isinstance(target, ast.Name):
                        own.setdefault(target.id, Definition(owner.module, statement))
            for inner in ast.walk(owner.node):
                for target in assigned(inner) if isinstance(inner, ast.stmt) else ():
                    if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        own.setdefault(target.attr, Definition(owner.module, inner))
            members = own | members
        return members

    def signature(self, definition: Definition, *, member: bool = False) -> Signature | None:
        """Of a function, a method without ``self``, a class's constructor; None if unknown."""
        node = definition.node
        if isinstance(node, FUNCTIONS):
            static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
            return Signature.of(node.args, bound=member and not static)
        if not definition.is_class:
            return None
        init = self.members(definition).get("__init__")
        if init is not None:
            return self.signature(init, member=True)
        ancestry = self.ancestry(definition)
        makers = [
            ast.unparse(maker)
            for owner in ancestry
            if isinstance(owner.node, ast.ClassDef)
            for maker in (*owner.node.decorator_list, *owner.node.bases)
        ]
        if not any(maker.split("(")[0].endswith(FIELD_MAKERS) for maker in makers):
            return None
        names: dict[str, bool] = {}
        for owner in reversed(ancestry):
            assert isinstance(owner.node, ast.ClassDef)
            for entry in owner.node.body:
                if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                    kind = ast.unparse(entry.annotation)
                    value = "" if entry.value is None else ast.unparse(entry.value)
                    if "ClassVar" not in kind and "init=False" not in value:
                        names[entry.target.id] = bool(value)
        return Signature(tuple(names), frozenset(name for name in names if names[name]))
