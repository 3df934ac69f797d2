"""Imports go down only, vLLM stays in its place, and pyproject.toml lists every package."""

from __future__ import annotations

import ast
import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "fusedstep": ROOT / "fusedstep",
    "fusedstep.bench": ROOT / "bench",
    "fusedstep.cli": ROOT / "cli",
    "fusedstep.kernels": ROOT / "triton_kernels",
}
# A module imports its own rank and below. Modules right under fusedstep/ that are not named here
# are the library's surface, above vllm_plugin.
RANKS = {
    "fusedstep.errors": 0,
    "fusedstep.guardian": 0,
    "fusedstep.processes": 1,
    "fusedstep.loop_forms": 0,
    "fusedstep.reasons": 0,
    "fusedstep.counts": 0,
    "fusedstep.demo": 1,
    "fusedstep.policy": 1,
    "fusedstep.options": 1,
    "fusedstep.grammar": 1,
    "fusedstep.kernels": 1,
    "fusedstep.ops": 2,
    "fusedstep.window": 3,
    "fusedstep.vllm_plugin": 4,
    "fusedstep.bench": 6,
    "fusedstep.cli": 7,
    "fusedstep.__main__": 8,
}
SURFACE = 5
VLLM_ANYWHERE = ("fusedstep.vllm_plugin", "fusedstep.llm", "fusedstep.bench.kernels.stock_step")
VLLM_IN_FUNCTIONS = ("fusedstep.bench", "fusedstep.cli")


@dataclass(frozen=True)
class Import:
    """One imported name, e.g. ``fusedstep.errors.ConfigError``; ``late`` if not at module level."""

    target: str
    line: int
    late: bool


def _modules() -> dict[str, Path]:
    """Every module of the project by import name."""
    return {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for package, folder in FOLDERS.items()
        for path in sorted(folder.rglob("*.py"))
    }


MODULES = _modules()


def _imports(module: str) -> Iterator[Import]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                name = "." * child.level + (child.module or "")
                base = importlib.util.resolve_name(name, package)
                yield from (
                    Import(f"{base}.{alias.name}", child.lineno, late) for alias in child.names
                )
            else:
                checks_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                in_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
                yield from walk(child, late or checks_types or in_function)

    return walk(ast.parse(path.read_text(encoding="utf-8")), late=False)


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _module(name: str) -> str:
    """The module of ours that an imported name is or is of; empty for others'."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def _rank(name: str) -> int:
    return next((rank for prefix, rank in RANKS.items() if _within(name, (prefix,))), SURFACE)


def test_every_folder_holds_modules() -> None:
    found = {".".join(name.split(".")[:2]) for name in MODULES}
    assert {*FOLDERS, "fusedstep.ops", "fusedstep.window", "fusedstep.vllm_plugin"} <= found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    upward = [
        f"line {found.line}: {found.target}"
        for found in _imports(module)
        if found.target.startswith("fusedstep.")
        and found.target != "fusedstep.__version__"
        and _rank(found.target) > _rank(module)
    ]
    if module == "fusedstep":  # it hands out the surface, lazily
        upward = [found for found in upward if "fusedstep.llm" not in found]
    assert not upward


@pytest.mark.parametrize("module", MODULES)
def test_vllm_stays_in_its_place(module: str) -> None:
    if _within(module, VLLM_ANYWHERE):
        return
    late_is_fine = _within(module, VLLM_IN_FUNCTIONS)
    wrong = [
        f"line {found.line}: {found.target}"
        for found in _imports(module)
        if _within(found.target, ("vllm",)) and not (late_is_fine and found.late)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("room", "other"), [("runner", "scheduler"), ("scheduler", "runner")], ids=lambda name: name
)
def test_worker_and_engine_core_meet_in_shared_modules_only(room: str, other: str) -> None:
    """One folder per process: a line of the worker's never runs in the engine core."""
    plugin = "fusedstep.vllm_plugin"
    wrong = [
        f"{module} line {found.line}: {found.target}"
        for module in MODULES
        if _within(module, (f"{plugin}.{room}",))
        for found in _imports(module)
        if _within(found.target, (f"{plugin}.{other}",))
    ]
    assert not wrong


def test_no_import_circle() -> None:
    """Imports for types and inside functions included."""
    graph = {
        module: {_module(found.target) for found in _imports(module)} - {module, ""}
        for module in MODULES
    }
    with pytest.raises(CycleError, match="nodes are in a cycle"):
        TopologicalSorter({**graph, "fusedstep.errors": {"fusedstep.cli.main"}}).prepare()
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("fusedstep.k")])
def test_device_code_imports_triton_only(module: str) -> None:
    allowed = ("__future__", "triton", "fusedstep.kernels")
    assert not [found.target for found in _imports(module) if not _within(found.target, allowed)]


def test_pyproject_lists_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = project["tool"]["setuptools"]
    folders = {
        name if path.name == "__init__.py" else name.rpartition(".")[0]
        for name, path in MODULES.items()
    }
    assert set(setuptools["packages"]) == folders
    outside = {name: folder for name, folder in FOLDERS.items() if name != "fusedstep"}
    assert {name: ROOT / folder for name, folder in setuptools["package-dir"].items()} == outside


@pytest.mark.parametrize("package", [p for p in MODULES if MODULES[p].name == "__init__.py"])
def test_packages_say_what_they_are(package: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[package].read_text(encoding="utf-8")))


def test_every_package_has_an_init() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_kernels_cannot_pass_for_upstream_triton_kernels() -> None:
    path = ROOT / "triton_kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("triton_kernels", path)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"fusedstep\.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "triton_kernels" not in sys.modules
