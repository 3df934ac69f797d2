"""The recipes of CONTRIBUTING.md name files that exist, all that a change needs, and few."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fusedstep.loop_forms import LoopForm
from fusedstep.ops.types import SamplingState

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = ("fusedstep", "triton_kernels", "cli", "bench")
# The parameters that a request may leave off; tables belong to the number beside them.
PARAMETERS = [name for name, spec in SamplingState.parameters().items() if spec.need]


LIMITS = "fusedstep/vllm_plugin/request_limits.py"  # only for values that vLLM cannot hold


def recipe(title: str) -> str:
    """Its numbered steps."""
    found = re.search(rf"## Recipe: {title}\n(.*?)(?=\n## |\Z)", TEXT, re.DOTALL)
    assert found is not None
    return "\n".join(re.findall(r"^\d\. .*(?:\n   .*)*", found[1], re.MULTILINE))


def paths(text: str) -> set[str]:
    return set(re.findall(r"`((?:fusedstep|triton_kernels|tests|bench|docs)/[\w./]*)`", text))


def mentions(pattern: str, folders: tuple[str, ...]) -> set[str]:
    """Files whose code matches, comments and docstrings included."""
    return {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = paths(text) | set(re.findall(r"\]\((?!http|#)([^)#]+)", text))
    assert len(named) > 5
    here = (ROOT / name).parent
    assert not [path for path in named if not ((ROOT / path).exists() or (here / path).exists())]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_sampling_parameter_touches_six_files(name: str) -> None:
    touched = mentions(rf"\b{name}\b", ("fusedstep", "triton_kernels")) - {LIMITS}
    assert touched <= paths(recipe("add a sampling parameter"))
    assert 4 <= len(touched) <= 6


@pytest.mark.parametrize("form", LoopForm)
def test_a_form_touches_four_files(form: LoopForm) -> None:
    touched = mentions(rf"LoopForm\.{form.name}\b|\"{form.value}\"", CODE)
    if form in (LoopForm.REPLAY, LoopForm.EAGER):  # the bases, which others name as such
        assert "fusedstep/loop_forms.py" in touched
        return
    assert touched <= paths(recipe("add a form of the loop"))
    assert 2 <= len(touched) <= 4
