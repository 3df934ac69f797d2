"""``fusedstep``: the group of commands. A command's module is imported when it is called."""

from __future__ import annotations

import importlib
import sys
from typing import Any, NoReturn

import click

from fusedstep import processes
from fusedstep.cli import console
from fusedstep.cli.options import Group
from fusedstep.errors import EXIT_CODE, INTERRUPTED, FusedStepError

COMMANDS = {
    "serve": "fusedstep.cli.serve:serve",
    "verify": "fusedstep.cli.verify:verify",
    "bench": "fusedstep.cli.bench_rollout:bench",  # the group, with all its commands
    "explain": "fusedstep.cli.explain:explain",
    "trace": "fusedstep.cli.trace:trace",
    "doctor": "fusedstep.cli.doctor:doctor",
}
# Kept here so that `fusedstep --help` imports no command.
SUMMARIES = {
    "serve": "Serve a model over the OpenAI API.",
    "verify": "Check that fused decoding gives the same tokens as stock vLLM.",
    "bench": "Measure fused decoding against stock vLLM.",
    "explain": "Say how long the windows of a running server are, and what limits them.",
    "trace": "Record a server's turns as a picture, for Perfetto.",
    "doctor": "Say what this machine can do, and what is missing.",
}


class LazyGroup(Group):
    """A group that imports its commands on use and prints our errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """click's, but an error of any kind is one line, and its exit code 2."""
        extra["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **extra))
        except (FusedStepError, click.ClickException) as error:
            console.print_error(error)
            sys.exit(EXIT_CODE)
        except (KeyboardInterrupt, click.Abort):
            sys.exit(INTERRUPTED)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="fusedstep", message="%(package)s %(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """fusedstep: several decode steps per scheduler turn, for vLLM."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """Entry point of the ``fusedstep`` script."""
    processes.interrupt_on_signals()
    group.main(prog_name="fusedstep")
