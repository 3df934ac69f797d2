"""The documentation as a site: strict, with every page, which looks there as in a checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from docs_blocks import ROOT, documents
from markdown_it import MarkdownIt

PAGES = [ROOT / "CHANGELOG.md", *documents()]
MOVED = {
    "README.md": "index",
    "docs/index.md": "documents",
    "examples/README.md": "examples",
}
# What the pages are made of.
TAGS = {"h1", "h2", "h3", "h4", "p", "ul", "ol", "li", "table", "tr", "th", "td", "pre", "code"}
TAGS |= {"em", "strong", "img"}


def build(config: Path, site: Path) -> str:
    """Builds the site as `make docs` does; what it has to complain of."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*command, "--config-file", config, "--site-dir", site],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    complaints = done.stderr.partition("Building documentation to directory")[2]
    assert (done.returncode != 0) == ("WARNING" in complaints), done.stderr
    return complaints if done.returncode else ""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert build(ROOT / "mkdocs.yml", folder) == ""
    return folder


def article(site: Path, page: Path) -> str:
    """A page's own part of the site."""
    path = str(page.relative_to(ROOT))
    name = MOVED.get(path, path.removeprefix("docs/").removesuffix(".md").lower())
    html = (site / f"{name}.html").read_text("utf-8")
    return html.partition("<article")[2].partition("</article>")[0]


class Elements(HTMLParser):
    """How often a page has each of TAGS, and where its links lead."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in TAGS:
            self.tags[tag] += 1
        self.links += [value for name, value in attrs if name in ("href", "src") and value]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_laid_out_as_in_a_checkout(site: Path, page: Path) -> None:
    """Lists, tables and blocks are those of CommonMark: mkdocs reads another dialect."""
    expected = Elements(MarkdownIt().enable("table").render(page.read_text("utf-8")))
    assert expected.tags["h1"] == 1
    assert Elements(article(site, page)).tags == expected.tags


def test_links_lead_to_files_of_the_site(site: Path) -> None:
    """Also those to sources, which have a page each."""
    found = 0
    for page in PAGES:
        for link in Elements(article(site, page)).links:
            path = link.partition("#")[0]
            if path and "://" not in link and not link.startswith("mailto:"):
                assert (site / path).is_file(), f"{page.name}: {link}"
                found += path.startswith("source/")
    assert found > 10
    shown = (site / "source" / "fusedstep" / "policy.py.html").read_text("utf-8")
    assert "def" in shown and "decide" in shown


def test_what_is_broken_ends_the_build(tmp_path: Path) -> None:
    """A link to nothing, one to a heading that is not there, a page that no one can find."""
    for path in ROOT.iterdir():
        if path.name not in ("docs", "mkdocs.yml") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path / "mkdocs.yml")
    with (tmp_path / "docs" / "policy.md").open("a") as file:
        file.write("\n[a](../fusedstep/none.py) [b](features.md#no-such-heading)\n")
    (tmp_path / "docs" / "alone.md").write_text("# Alone\n")
    errors = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert "../fusedstep/none.py" in errors
    assert "#no-such-heading" in errors
    assert re.search(r"not included in the \"nav\"[^:]*:\s+- alone.md", errors)
    assert errors.count("WARNING") == 3


def test_the_changelog_is_in_order() -> None:
    """What is not released first, then versions, the newest first (keepachangelog.com)."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    first, *versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert first == "Unreleased" and versions
    for version in versions:
        assert re.fullmatch(r"\d+\.\d+\.\d+( - \d{4}-\d\d-\d\d)?", version), version
    dates = [version.partition(" - ")[2] for version in versions]
    assert dates == sorted(dates, reverse=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert versions[0].partition(" ")[0] == project["version"]
