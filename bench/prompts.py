"""Prompts files: one prompt per line, or JSONL with sampling fields."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedstep.errors import ConfigError
from fusedstep.vllm_plugin.launch import sources

DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")
WANT = "one prompt per line, or JSONL"


@dataclass(frozen=True)
class Request:
    """One prompt with its sampling fields (vLLM's SamplingParams names)."""

    prompt: str
    sampling: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)  # "FILE line N", for errors
    image: Path | None = None  # before the prompt

    @property
    def name(self) -> str:
        """The prompt as a report shows it."""
        return self.prompt if self.image is None else f"[{self.image.name}] {self.prompt}"


def read_requests(path: Path | None, sampling: dict[str, Any]) -> list[Request]:
    """Prompts of a text file (one per line) or JSONL file; ``sampling`` fills in what is absent.

    Raises ConfigError, with file and line, when the file cannot be read, holds no prompt, or a
    line has no prompt or a sampling field that vLLM does not take.
    """
    path = path or DEFAULT_PROMPTS
    lines = [(n, line) for n, line in enumerate(_lines(path), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"the prompts file {path} is empty: {WANT}")
    if not lines[0][1].lstrip().startswith("{"):
        return [Request(line, sampling, f"{path} line {n}") for n, line in lines]
    return [_request(f"{path} line {n}", line, sampling) for n, line in lines]


def _lines(path: Path) -> Iterator[str]:
    """Lines of UTF-8, with or without a byte-order mark, as Unix, Windows or old Macs end them."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the prompts file {path} ({error.strerror})") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise ConfigError(f"cannot read the prompts file {path} (UTF-16?): save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"cannot read the prompts file {path} (line {line} is not UTF-8): save it as UTF-8"
        ) from None
    return iter(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))


def _request(where: str, line: str, sampling: dict[str, Any]) -> Request:
    try:
        fields = json.loads(line)
        prompt = fields.pop("prompt")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise ConfigError(f'{where}: want JSON with a text "prompt" and sampling fields')
    return Request(prompt, sampling | sources.sampling(where, fields), where)
