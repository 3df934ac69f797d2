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
