"""The code blocks of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
SHELL = ("sh", "console")
LANGUAGES = (*SHELL, "python", "json", "text")
# What a command line of this project begins with, in running text too.
OURS = ("fusedstep ", "make ", "python -m fusedstep")
NUMBERS = {"N": "1", "MS": "50"}  # what stands for a number
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


@dataclass(frozen=True)
class Block:
    """A block of code; ``language`` is what its fence says, "" for an indented block."""

    where: str
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command: its words without variables set for it; what a user fills in is in capitals."""

    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


def documents() -> list[Path]:
    """Every page of ours; the changelog is about what was."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
    return sorted(page for page in pages if page.name != "CHANGELOG.md")


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, also in lists."""
    return [
        Block(f"{page.relative_to(ROOT)}:{token.map[0] + 1}", token.info.strip(), token.content)
        for token in MarkdownIt().parse(page.read_text("utf-8"))
        if token.type in ("fence", "code_block") and token.map
    ]


def commands(page: Path) -> list[Command]:
    """The commands of a page: in its shell blocks, and those of ours in its text."""
    found = [c for block in blocks(page) for c in _of_block(block)]
    for token in MarkdownIt().enable("table").parse(page.read_text("utf-8")):
        for child in token.children or ():
            text = child.content.replace("\n", " ")
            if child.type == "code_inline" and text.startswith(OURS):
                line = token.map[0] + 1 if token.map else 0
                found += _of_line(f"{page.relative_to(ROOT)}:{line}", text)
    return found


def _of_block(block: Block) -> Iterator[Command]:
    if block.language not in (*SHELL, "text"):
        return
    begun = ""  # a line that goes on: its quotes are open
    for line in block.text.replace("\\\n", " ").splitlines():
        if begun or line.startswith("$ ") or block.language == "sh":
            begun += line if begun else line.removeprefix("$ ")
            try:
                shlex.split(begun, comments=True)
            except ValueError:
                begun += "\n"
                continue
            yield from _of_line(block.where, begun)
            begun = ""
    if begun:
        yield Command(block.where, ("no-end-of-a-quote-in", begun))


def _of_line(where: str, line: str) -> Iterator[Command]:
    """The commands of a line: ``[--flag]`` stands for the flag, ``a|b`` for a."""
    line = re.sub(r"\[any [^]]*\]|\.\.\.(?=\s|\]|$)", "", line)
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), ";"]:
        if word in ("&&", ";", "|", "&"):
            if words:
                yield Command(where, tuple(words))
            words = []
        elif words or not ASSIGNMENT.fullmatch(word):
            words.append(_plain(word))


def _plain(word: str) -> str:
    if word.startswith("{"):  # JSON
        return word
    word = word.strip("[]")
    if re.fullmatch(r"[\w.:/=-]+(\|[\w.:/=-]+)+", word):
        word = word.partition("|")[0]
    return NUMBERS.get(word, word)
