"""``fusedstep explain``: limits of a running server's windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fusedstep.cli import console
from fusedstep.cli.options import Real

if TYPE_CHECKING:
    from rich.console import Group

    from fusedstep.counts import WindowCounts


MAX_SECONDS = 86400.0
WATCH_SECONDS = 2.0  # of a table of --watch, without --seconds


@click.command()
@click.option(
    "--url",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="The server: a URL, HOST:PORT or a port; its metrics are at URL/metrics.",
)
@click.option(
    "--seconds",
    type=Real(0, MAX_SECONDS),
    default=0.0,
    help="Watch for so long. [default: all since the server's start]",
)
@click.option(
    "--watch",
    is_flag=True,
    help=f"A table of the last --seconds (default {WATCH_SECONDS:g}), again and again, to Ctrl-C.",
)
@console.json_option
def explain(url: str, seconds: float, watch: bool, json_path: str | None) -> None:
    """Say how long the windows of a running server are, and what limits them."""
    from fusedstep.explain import explain

    if watch and json_path is not None:
        raise click.UsageError("--watch prints tables: leave out --json")
    if watch:
        _watch(url, seconds or WATCH_SECONDS)
        return
    windows = explain(url, seconds)
    if json_path is not None:
        console.write_json(json_path, windows.as_dict())
    if json_path != "-":
        console.stdout().print(_table(windows))


def _watch(url: str, seconds: float) -> None:
    """Until it is interrupted, which is its end (exit code 130, as of the other commands)."""
    from rich.live import Live

    from fusedstep.explain import watch

    out = console.stdout()
    with Live(console=out, auto_refresh=False, transient=True) as live:
        for windows in watch(url, seconds):
            if out.is_terminal:
                live.update(_table(windows), refresh=True)
            else:
                out.print(_table(windows))


def _table(windows: WindowCounts) -> Group:
    """Turns by reason, and what they sum up to."""
    from rich.console import Group
    from rich.table import Table

    when = "since the start" if windows.seconds is None else f"in {windows.seconds:.1f} s"
    table = Table(title=f"Windows {when}", title_justify="left")
    table.add_column("")
    table.add_column("turns", justify="right")
    table.add_column("share", justify="right")
    turns = windows.windows + sum(windows.one_step_turns.values())

    def row(words: str, number: int) -> None:
        if number:
            table.add_row(words, str(number), f"{number / turns:.0%}")

    for reason, number in sorted(windows.limits.items(), key=lambda item: -item[1]):
        row(f"window, bound by: {reason}", number)
    for reason, number in sorted(windows.one_step_turns.items(), key=lambda item: -item[1]):
        row(f"one step: {reason}", number)
    lines = [
        f"{windows.windows} windows of {windows.steps_per_window:.1f} steps, {windows.tokens} "
        f"tokens; {windows.early_exits} ended early, {windows.unused_steps} reserved steps were "
        f"not used; {windows.host_ms_per_token:.3f} ms of the scheduler per token"
    ]
    if windows.drafts:
        held = windows.accepted_drafts / windows.drafts
        lines.append(f"{windows.drafts} drafts were verified: {held:.0%} held, the others did not")
    if windows.refused_tokens:
        lines.append(
            f"{windows.refused_tokens} requests failed: the host's grammar refused a token that "
            "the device had let through. Please report it, with the grammar."
        )
    return Group(table, *lines)
