"""``fusedstep doctor``: what this machine can do, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fusedstep.cli import console
from fusedstep.errors import EXIT_CODE

if TYPE_CHECKING:
    from fusedstep.doctor import Diagnosis

_STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command()
@console.json_option
@click.pass_context
def doctor(ctx: click.Context, json_path: str | None) -> None:
    """Say what this machine can do, and what is missing.

    Exits with 0 when `fusedstep serve` would work here, else with 2.
    """
    from fusedstep.doctor import diagnose

    diagnosis = diagnose()
    if json_path is not None:
        console.write_json(json_path, diagnosis)
    if json_path != "-":
        _print(diagnosis)
    ctx.exit(0 if diagnosis.can_serve else EXIT_CODE)


def _print(diagnosis: Diagnosis) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for check in diagnosis.checks:
        found = Text(check.found)
        if check.advice:
            found.append(f"\n{check.advice}", style=_STYLES[check.status])
        table.add_row(Text(check.status, style=_STYLES[check.status]), Text(check.name), found)
    for form in diagnosis.loop_forms:
        status = Text("yes", style="green") if form.possible else Text("no", style="dim")
        table.add_row(status, Text(f"loop: {form.name}"), Text(form.why))
    out = console.stdout()
    out.print(table)
    if diagnosis.can_serve:
        out.print("fusedstep serve works here.", style="green")
    else:
        out.print("fusedstep serve does not work here yet: see the problems above.", style="red")
