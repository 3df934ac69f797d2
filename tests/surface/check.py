"""Holds the list against our sources, and a vLLM against the list. Each problem is one line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from surface.listed import LISTED, Entry, Item, Ref, Type, resolve
from surface.tree import FUNCTIONS, Definition, Tree
from surface.uses import OwnClass, Uses, shape
from surface.vllm_names import ENVIRONMENT, SAYS, SURFACE

OUR_LOGGER = "vllm.fusedstep"
UNKNOWN = "nothing that can be called, as far as its source shows"


def unlisted(uses: Uses) -> Iterator[str]:
    """Uses that the list has not."""
    for (module, name), place in uses.names.items():
        if (module, name) not in LISTED and (name or module not in SURFACE):
            yield f"{place}: {module}.{name}".rstrip(".") + " is not listed"
    for (module, name, member), place in uses.members.items():
        if not LISTED.get((module, name), Entry()).member(member):
            yield f"{place}: {module}.{name}.{member} is not listed"
    for (module, name, member, arguments), place in uses.calls.items():
        listed = [i for i in LISTED.get((module, name), Entry()).of("call") if i.member == member]
        if arguments not in [shape(item.signature) for item in listed]:
            yield f"{place}: {_path(module, name, member)} is not listed with this call's arguments"
    overrides = {item.member for entry in LISTED.values() for item in entry.of("override")}
    for (_, name, member, _), place in uses.super_calls.items():
        if member not in overrides:
            yield f"{place}: super().{member} of {name} is not listed"
    for own in uses.classes.values():
        for base in uses.vllm_bases(own):
            if (base.module, base.name) not in LISTED:
                yield f"{own.name}: its base {base.module}.{base.name} is not listed"
    said = {text for texts in SAYS.values() for text in texts}
    for text, place in uses.strings.items():
        if re.fullmatch(r"VLLM_[A-Z0-9_]+", text) and text not in ENVIRONMENT:
            yield f"{place}: environment variable {text} is not listed"
        known = text in {*SURFACE, *SAYS, *said, OUR_LOGGER} or _is_prefix(text)
        if re.fullmatch(r"vllm\.[a-z0-9_.]+", text) and not known:
            yield f'{place}: the string "{text}" is not listed'


def _is_prefix(text: str) -> bool:
    return text.endswith(".") and any(module.startswith(text) for module in SURFACE)


def _path(*parts: str) -> str:
    return ".".join(filter(None, parts))


def unused(uses: Uses) -> Iterator[str]:
    """Lines of the list that our sources do not bear out."""
    reached = {key[:2] for key in (*uses.names, *uses.members, *uses.calls)}
    reached |= {(b.module, b.name) for own in uses.classes.values() for b in uses.vllm_bases(own)}
    functions = {f.name for f in uses.functions}
    for module, names in SURFACE.items():
        if not names and (module, "") not in uses.names:
            yield f"{module} is listed, but not used"
    for (module, name), entry in LISTED.items():
        path = _path(module, name)
        by_string = any(path.endswith(f".{text}") for text in uses.strings)  # a kernel, say
        if not ((module, name) in reached or by_string or entry.of("replaced", "override")):
            yield f"{path} is listed, but not used"
        for item in entry.items:
            key = (module, name, item.member)
            if item.kind in ("attribute", "added") and item.member:
                if key not in uses.members and item.member not in uses.strings:
                    yield f"{path}.{item.member} is listed, but not used"
            elif item.kind == "call" and (*key, shape(item.signature)) not in uses.calls:
                yield f"{_path(*key)} is listed with arguments that no call passes"
            elif item.kind == "override" and (item.member, item.signature) not in [
                (f.name, f.signature) for f in uses.functions
            ]:
                known = "with other parameters" if item.member in functions else "nowhere"
                yield f"{path}.{item.member} is listed as an override, but we define it {known}"
        for item in entry.items:
            if item.until and not _goes_on(name, item):
                yield f"{_path(module, name, item.member)} ends, and nothing takes its place"
    for name in ENVIRONMENT:
        if name not in uses.strings:
            yield f"environment variable {name} is listed, but not used"
    for module, texts in SAYS.items():
        for text in texts:
            if text.removeprefix("class ") not in uses.strings:
                yield f'{module} is listed to say "{text}", which we do not look for'


def _goes_on(name: str, ended: Item) -> bool:
    """Is what ended in one version listed for the versions from there on, here or elsewhere?"""
    return any(
        (other, item.kind, item.member, item.since) == (name, ended.kind, ended.member, ended.until)
        for (_, other), entry in LISTED.items()
        for item in entry.items
    )


def missing(tree: Tree, version: str, uses: Uses) -> Iterator[str]:
    """What this vLLM has not, or has otherwise."""
    for module, names in SURFACE.items():
        if not names and tree.module(module) is None:
            yield f"{module}: not there"
    for (module, name), entry in LISTED.items():
        items = [item for item in entry.items if item.is_for(version)]
        if entry.items and not items:
            continue
        if not tree.is_bound(module, name):
            yield f"{module}.{name}: not there"
            continue
        definition = tree.find(module, name)
        if definition is None:
            yield from [f"{module}.{name}: not vLLM's own any more"] if items else []
            continue
        for item in items:
            for problem in _problems(tree, definition, item, entry):
                yield f"{_path(module, name, item.member)}: {problem}"
    for own in uses.classes.values():
        yield from _as_base(tree, own, uses, version)
    for (module, name, method, arguments), place in uses.super_calls.items():
        overrides = [i for i in LISTED[module, name].of("override") if i.member == method]
        if all(item.is_for(version) for item in overrides):
            definition = tree.find(module, name)
            found = definition and tree.members(definition).get(method)
            signature = found and tree.signature(found, member=True)
            for problem in signature.why_not_called_with(arguments) if signature else ():
                yield f"{module}.{name}.{method}: {problem} ({place})"
    variables = tree.read("vllm/envs.py") or ""
    for name in ENVIRONMENT:
        if not re.search(rf"\b{name}\b", variables):
            yield f"vllm.envs: no {name}"
    for path, texts in SAYS.items():
        found_module = tree.module(path)
        for text in texts:
            if found_module is None or text not in found_module.text:
                yield f'{path}: does not say "{text}"'


def _problems(tree: Tree, definition: Definition, item: Item, entry: Entry) -> Iterator[str]:
    members = tree.members(definition) if definition.is_class else {}
    member = members.get(item.member)
    if item.member == "__call__" and member is None:
        member = members.get("forward")  # torch.nn.Module calls it
    match item.kind:
        case "kernel":
            yield from _kernel(tree, definition, item, entry)
        case "replaced":
            listed = {override.member for override in entry.of("override")}
            for name in _own_methods(definition) - listed:
                yield f"has a method '{name}', which our replacement does not know"
        case "added":
            if member is not None:
                yield "we set this name on vLLM's object, now vLLM has it"
        case "call" if not item.member:
            signature = tree.signature(definition)
            yield from signature.why_not_called_with(item.signature) if signature else [UNKNOWN]
        case "attribute" | "call" | "override" if item.member and member is None:
            yield "not there"
        case "attribute" if member is not None:
            for listed_type in _flat(resolve(item.type_name)):
                yield from _other_class(tree, member, listed_type)
        case "call" | "override" if member is not None:
            signature = tree.signature(member, member=True)
            if signature is None:
                yield UNKNOWN
            elif item.kind == "call":
                yield from signature.why_not_called_with(item.signature)
            else:
                yield from signature.why_not_overridden_by(item.signature)


def _flat(types: Type) -> list[Ref]:
    parts = types if isinstance(types, tuple) else (types,)
    return [ref for part in parts for ref in (_flat(part) if isinstance(part, tuple) else part)]


def _other_class(tree: Tree, member: Definition, listed: Ref) -> Iterator[str]:
    """Is an attribute's class, where the source names one, the one listed or akin to it?"""
    node = member.node
    named: ast.AST | None = getattr(node, "annotation", None) or getattr(node, "returns", None)
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
        named = node.value.func
    names = set(re.findall(r"\b[A-Z]\w*[a-z]\w*", ast.unparse(named) if named else ""))
    names -= {"None", "Any", "Optional", "Sequence"}
    found = [tree.find(member.module, name) for name in names]
    classes = [each for each in found if each is not None and each.is_class]
    expected = tree.find(listed.module, listed.name)
    if not classes or expected is None:
        return
    akin = (
        listed.name in names or a in tree.ancestry(expected) or expected in tree.ancestry(a)
        for a in classes
    )
    if not any(akin):
        yield f"is a {' or '.join(sorted(names))}, not a {listed.name}"


def _own_methods(definition: Definition) -> set[str]:
    body = getattr(definition.node, "body", [])
    return {statement.name for statement in body if isinstance(statement, FUNCTIONS)}


def _kernel(tree: Tree, definition: Definition, item: Item, entry: Entry) -> Iterator[str]:
    theirs = tree.signature(definition)
    (ignored,) = entry.of("ignored")
    assert theirs is not None
    for place, name in enumerate(item.signature.by_position):
        if name not in theirs.positional:
            yield f"has no parameter '{name}'"
        elif theirs.positional.index(name) != place:
            yield f"parameter '{name}' is not in place {place + 1} any more"
    known = {*item.signature.positional, *ignored.signature.positional}
    for name in theirs.positional:
        if name not in known:
            yield f"has a parameter '{name}', which our stand-in does not know"
    for name in sorted(item.signature.by_keyword - set(theirs.positional)):
        yield f"has no constant '{name}'"


def _as_base(tree: Tree, own: OwnClass, uses: Uses, version: str) -> Iterator[str]:
    """Names of a class of ours that vLLM's class has too, and abstract methods that it lacks."""
    bases = uses.vllm_bases(own)
    items = [i for b in bases for i in LISTED[b.module, b.name].items if i.is_for(version)]
    expected = {item.member for item in items if item.kind != "added"}
    for base in sorted(bases, key=str):
        definition = tree.find(base.module, base.name)
        for name, member in (tree.members(definition) if definition else {}).items():
            decorators = [ast.unparse(d) for d in getattr(member.node, "decorator_list", [])]
            if name in own.names and name not in expected:
                yield f"{base.module}.{base.name}.{name}: our {own.name} has this name too"
            elif name not in own.names and "abstractmethod" in decorators:
                yield f"{base.module}.{base.name}.{name}: abstract, our {own.name} lacks it"
