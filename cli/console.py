"""Output of the commands: data on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fusedstep.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

_FILE_WIDTH = 160
Command = TypeVar("Command", bound=Callable[..., Any])


def stdout() -> Console:
    """Where data goes: tables and results."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH  # a file or a pipe has no edge to wrap at
    return console


def stderr() -> Console:
    """Where progress, notes and errors go."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_error(error: Exception) -> None:
    """One red line on stderr."""
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    line = " ".join(message.split())
    stderr().print(f"error: {line}", style="red", markup=False, soft_wrap=True)


def json_option(command: Command) -> Command:
    """Add ``--json FILE|-`` to a command, as its parameter ``json_path`` (None without it)."""
    option = click.option(
        "--json",
        "json_path",
        metavar="FILE|-",
        callback=_writable,
        help="Write the result as JSON to FILE; '-' prints it instead of the table.",
    )
    return option(command)


def _writable(ctx: click.Context, param: click.Parameter, json_path: str | None) -> str | None:
    """Find out before the work, not after it, and leave no empty file behind."""
    if json_path in (None, "-"):
        return json_path
    path = Path(json_path)
    if path.is_dir():
        raise _cannot_write(json_path, "it is a folder")
    if not path.parent.is_dir():
        raise _cannot_write(json_path, "its folder does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _cannot_write(json_path, "permission denied")
    return json_path


def _cannot_write(json_path: str, reason: str | None) -> ConfigError:
    return ConfigError(f"cannot write {json_path} ({reason}): name another file after --json")


def write_json(json_path: str, result: object) -> None:
    """Write a dataclass (or plain data) as JSON to a file, or to stdout for '-'.

    Raises:
        ConfigError: the file cannot be written.
    """
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = dataclasses.asdict(result)
    text = json.dumps(result, indent=2, ensure_ascii=False, default=str) + "\n"
    if json_path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(json_path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _cannot_write(json_path, error.strerror) from error
