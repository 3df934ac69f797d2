"""mkdocs' hooks: the pages that stand beside docs/, and links to the repository's other files.

In a checkout a link is a path. On the site a link to a page leads to the page, and one to another
file, such as a source, to a page that shows it. ``mkdocs.yml`` has the rest.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

# Where a file of the repository stands on the site, if not where it stands under docs/.
PAGES = {
    "README.md": "index.md",
    "docs/index.md": "documents.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
SOURCE = "source"  # the folder of files that are shown
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages beside docs/, and a page for each file that a page links to."""
    root = _root(config)
    for path, uri in PAGES.items():
        if uri in files.src_uris:
            files.remove(files.src_uris[uri])
        files.append(File.generated(config, uri, content=(root / path).read_text("utf-8")))
    for page in list(files.documentation_pages()):
        text = page.content_string
        for link in LINK.finditer(text):
            path = _target(root, page.src_uri, link[1])
            uri = _uri(path) if path else ""
            if uri.startswith(f"{SOURCE}/") and uri not in files.src_uris:
                shown = _shown(root, path)
                files.append(
                    File.generated(config, uri, content=shown, inclusion=InclusionLevel.NOT_IN_NAV)
                )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes a checkout's links those of the site."""
    root, here = _root(config), posixpath.dirname(page.file.src_uri)

    def replaced(link: re.Match[str]) -> str:
        path = _target(root, page.file.src_uri, link[1])
        if not path:  # another site's; or a broken one, which mkdocs reports
            return link[0]
        return f"]({posixpath.relpath(_uri(path), here or '.')}{link[2] or ''})"

    return markdown if here.startswith(SOURCE) else LINK.sub(replaced, markdown)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def _target(root: Path, page: str, link: str) -> str:
    """The file of the repository that a page's link names; "" if there is none."""
    names = {uri: path for path, uri in PAGES.items()}
    folder = posixpath.dirname(names.get(page, f"docs/{page}"))
    path = posixpath.normpath(posixpath.join(folder, link))
    if (root / path).is_dir():
        path = f"{path}/README.md"
    return path if (root / path).is_file() and not path.startswith("..") else ""


def _uri(path: str) -> str:
    """Where a file of the repository stands on the site."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{SOURCE}/{path}.md"


def _shown(root: Path, path: str) -> str:
    """A page with a file's text."""
    return f"# {path}\n\n````{path.rpartition('.')[2]}\n{(root / path).read_text('utf-8')}\n````\n"
