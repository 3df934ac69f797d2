"""All that we patch in vLLM or hang on its objects is listed, and nothing else is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from fusedstep.vllm_plugin.patch import Patch
from fusedstep.vllm_plugin.patches import PATCHES

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "fusedstep" / "vllm_plugin"
# Bases that are not vLLM's: attributes that hold objects of ours, the environment.
OURS = ("self.stats", "self.counts", "self.arrivals", "self.door", "os")
REGISTERS = ("register_backend", "register_kernels", "copyreg.pickle")
SETTERS = ("setattr", "patch.object")


def changes(source: str) -> Iterator[str]:
    """Targets outside of a class of ours: attributes that are assigned, entries, registrations."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("fusedstep")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in REGISTERS or name in SETTERS or name.endswith(".addFilter"):
                yield name
            continue
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if not isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            continue
        for target in targets:
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                text = ast.unparse(part)
                base = ast.unparse(part.value) if hasattr(part, "value") else ""
                if isinstance(part, ast.Attribute) and base not in ("self", "cls"):
                    if not any(f"{base}.".startswith(f"{own}.") for own in OURS):
                        yield text
                elif isinstance(part, ast.Subscript) and base in imported:
                    yield text


def unlisted(by: str, source: str) -> list[str]:
    listed = [patch.target for patch in PATCHES if patch.by == by]
    return [
        found
        for found in changes(source)
        if not any(fnmatchcase(found, target.replace("[", "[[]")) for target in listed)
    ]


@pytest.mark.parametrize("path", sorted(PLUGIN.rglob("*.py")), ids=lambda path: path.stem)
def test_every_patch_is_listed(path: Path) -> None:
    by = path.relative_to(PLUGIN).as_posix()
    assert not unlisted(by, path.read_text(encoding="utf-8"))


def test_an_unlisted_patch_is_found() -> None:
    """Of each kind."""
    source = """
from vllm.v1.engine import core
from triton.backends import backends
core.EngineCore.step = step
output.seen: int = 1
a, request.num_tokens = 1, 2
self.scheduler.running = []
backends["cpu"] = 1
self.ours = backend_of_ours["cpu"] = 2
self.door.is_open = True
register_kernels({})
setattr(core, "x", 1)
logging.getLogger("vllm").addFilter(f)
"""
    assert len(unlisted("x.py", source)) == 8


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_no_listed_patch_is_gone(patch: Patch) -> None:
    source = (PLUGIN / patch.by).read_text(encoding="utf-8")
    target = patch.target.replace("[", "[[]")
    assert any(fnmatchcase(found, target) for found in changes(source))
