"""``fusedstep explain``: limits of a running server's windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fusedstep.cli import console
from fusedstep.cli.options import Real

if TYPE_CHECKING:
    from fusedstep.counts import WindowCounts


MAX_SECONDS = 86400.0


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
@console.json_option
def explain(url: str, seconds: float, json_path: str | None) -> None:
    """Say how long the windows of a running server are, and what limits them."""
    from fusedstep.explain import explain

    windows = explain(url, seconds)
    if json_path is not None:
        console.write_json(json_path, windows.as_dict())
    if json_path != "-":
        _print(windows)


def _print(windows: WindowCounts) -> None:
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
    out = console.stdout()
    out.print(table)
    out.print(
        f"{windows.windows} windows of {windows.steps_per_window:.1f} steps, {windows.tokens} "
        f"tokens; {windows.early_exits} ended early, {windows.unused_steps} reserved steps were "
        f"not used; {windows.host_ms_per_token:.3f} ms of the scheduler per token"
    )
    if windows.refused_tokens:
        out.print(
            f"{windows.refused_tokens} requests failed: the host's grammar refused a token that "
            "the device had let through. Please report it, with the grammar."
        )
