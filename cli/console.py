"""Output of the commands: data on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fusedstep.bench import progress as steps
from fusedstep.bench import result_file

if TYPE_CHECKING:
    from rich.console import Console

_FILE_WIDTH = 160
Command = TypeVar("Command", bound=Callable[..., Any])


def stdout() -> Console:
    """Console of data: tables and results."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH  # a file or a pipe has no edge to wrap at
    return console


def stderr() -> Console:
    """Console of progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_stock_steps(stock_steps: dict[str, int]) -> None:
    """The reasons why batches were not decoded in windows, if there are more than prefills."""
    from fusedstep.reasons import Reason

    shown = {str(reason): n for reason, n in stock_steps.items() if reason != Reason.PREFILL}
    if shown:
        of_reasons = ", ".join(f"{reason}: {n}" for reason, n in shown.items())
        stdout().print(f"stock steps in fusedstep: {of_reasons}", markup=False)


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
        callback=writable,
        help="Write the result as JSON to FILE; '-' prints it instead of the table.",
    )
    return option(command)


def html_option(command: Command) -> Command:
    """Add ``--html FILE`` to a command, as its parameter ``html_path`` (None without it)."""
    option = click.option(
        "--html",
        "html_path",
        metavar="FILE",
        callback=_can_draw,
        help="Write pictures to FILE, one page that needs nothing beside it. Needs plotly.",
    )
    return option(command)


def _can_draw(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    if path is not None:
        from fusedstep.bench import report

        report.check()
    return writable(ctx, param, path)


def write_html(path: str, page: str) -> None:
    """Raises ConfigError where the file cannot be written."""
    result_file.write_text(path, page, option="--html")


def writable(ctx: click.Context, param: click.Parameter, json_path: str | None) -> str | None:
    """Callback of options that name a file to write: found out before the work."""
    if json_path not in (None, "-"):
        result_file.check(json_path, param.opts[-1])
    return json_path


def write_json(json_path: str, result: object) -> None:
    """Write a dataclass (or plain data) as JSON to a file, or to stdout for '-'.

    Raises:
        ConfigError: the file cannot be written.
    """
    if json_path == "-":
        sys.stdout.write(result_file.as_json(result))
    else:
        result_file.write(json_path, result)


@contextlib.contextmanager
def progress(json_path: str | None) -> Iterator[steps.Progress]:
    """Progress of a long command, on stderr, and its findings so far, in its JSON file.

    A terminal shows one line that changes; a file gets a line per step, with the time.
    """
    console = stderr()
    if not console.is_terminal:
        yield steps.to(json_path)
        return
    with console.status("preparing") as status:
        yield steps.to(json_path, status.update)
