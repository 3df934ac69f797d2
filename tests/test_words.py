"""Plain words: a docstring begins with what the thing is or does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    *(p for d in ("fusedstep", "bench", "cli", "triton_kernels") for p in (ROOT / d).rglob("*.py")),
    ROOT / "setup_env.py",
]
RIDDLES = ("What", "Who", "Why", "Whether", "Where")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_what_a_thing_is_or_does(path: Path) -> None:
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = (ast.get_docstring(node) or "-").split()[0]
            if first.strip(",:'") in RIDDLES:
                wrong.append(f"{getattr(node, 'name', 'module')}: {ast.get_docstring(node)}")
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_named_place(path: Path) -> None:
    """An index, an offset, a rank and a pointer have names."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    names += [node.arg for node in nodes if isinstance(node, ast.arg)]
    assert not {"place", "places"} & set(names)
