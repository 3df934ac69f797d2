"""What a contributor meets first: hooks, templates, the hosted workflow, links between pages."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_blocks import ROOT, documents

GITHUB = ROOT / ".github"
FORMS = [
    path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"
]


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def _make(*arguments: str) -> str:
    """What make would run."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hooks_run_what_lint_runs_and_download_nothing() -> None:
    repos = _yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert {repo["repo"] for repo in repos} == {"local"}
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    lint = _make("lint")
    for hook in hooks:
        command = hook["entry"].replace(" --force-exclude", "")
        assert command == "make lint" or f"{command} ." in lint


def test_lint_checks_rules_format_and_types() -> None:
    lint = _make("lint")
    for part in ("ruff check .", "ruff format --check .", "mypy"):
        assert part in lint


def test_workflow_runs_lint_and_tests_on_a_cpu() -> None:
    workflow = _yaml(GITHUB / "workflows" / "ci.yml")
    lines = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    assert any(line.startswith("make test") for line in lines)
    for line in lines:
        _, *arguments = shlex.split(line)
        assert _make(*arguments)


def test_engines_have_a_phase_of_their_own_in_two_streams() -> None:
    """An engine has one thread, on any core; all others run before, and no file in both."""
    recipe = _make("test").replace("\\\n", " ").splitlines()
    (line,) = (line for line in recipe if line.count("bin/pytest ") == 2)
    others, engines = (part.split(";")[0].split() for part in line.split("bin/pytest ")[1:])
    named = [word for word in engines if word.startswith("tests/")]
    assert [f"--ignore={name}" for name in named] == [w for w in others if "--ignore" in w]
    assert "tests/engine" in named and all((ROOT / name).exists() for name in named)
    assert "OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind" in " ".join(line.split())
    assert "--dist loadfile" in " ".join(engines)


def test_tests_that_share_engines_are_one_group(tmp_path: Path) -> None:
    """As their files say, since the process that deals them out has not collected them."""
    from engine.conftest import group

    files = {
        "test_a.py": "def test_a(client: object) -> None:\n    pass",
        "test_b.py": "@fixture\ndef both_of(model: str, fused: object) -> None:\n    pass",
        "test_c.py": "def helper(fused: int, server: int) -> None:\n    pass",
        "test_d.py": "def test_d(model: str, server_of: str) -> None:\n    pass",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert [group(tmp_path, name) for name in files] == ["server", "children", *[*files][2:]]
    real = [path.name for path in (ROOT / "tests/engine").glob("test_*.py")]
    groups = {name: group(ROOT, f"tests/engine/{name}") for name in real}
    assert groups["test_server.py"] == groups["test_examples.py"] == "server"
    assert groups["test_features.py"] == groups["test_sampling.py"] == "children"
    assert groups["test_cli.py"] == "tests/engine/test_cli.py"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form_is_whole(path: Path) -> None:
    """What the host asks of a form, so that it is shown."""
    form = _yaml(path)
    assert {"name", "description", "body"} <= set(form)
    identities = [part["id"] for part in form["body"]]
    assert len(identities) == len(set(identities)) > 0
    for part in form["body"]:
        assert part["type"] in ("textarea", "input", "dropdown") and part["attributes"]["label"]
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_links_between_pages_lead_somewhere() -> None:
    for page in documents():
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_index_lists_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in text, page.name
