"""``fusedstep trace``: a server's turns as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from fusedstep.bench import result_file
from fusedstep.cli import console
from fusedstep.cli.options import Real, VllmCommand, window_options
from fusedstep.errors import ConfigError
from fusedstep.options import NAMES

if TYPE_CHECKING:
    from fusedstep.options import Options
    from fusedstep.trace import Trace

MAX_SECONDS = 600.0


@click.command(cls=VllmCommand, server=True)
@click.option("--url", help="A running server on this machine: a URL, HOST:PORT or a port.")
@click.option("--seconds", type=Real(0.1, MAX_SECONDS), default=5.0, show_default=True)
@click.option(
    "-o",
    "--output",
    default="trace.json",
    show_default=True,
    metavar="FILE",
    callback=console.writable,
    help="Open it in https://ui.perfetto.dev or chrome://tracing.",
)
@window_options
def trace(
    url: str | None, seconds: float, output: str, options: Options, vllm_args: tuple[str, ...]
) -> None:
    """Record every turn of a server: scheduler, host and device, arrivals, first tokens.

    With --url of a running one. Else MODEL (without it the bundled one) is served meanwhile, under
    a small load; every other option goes to that server.
    """
    from fusedstep import processes
    from fusedstep import trace as library

    if url is not None:
        source = click.get_current_context().get_parameter_source
        given = [name for name in NAMES if source(name) is ParameterSource.COMMANDLINE]
        if vllm_args or given:
            raise ConfigError("--url names a running server: leave out MODEL and its options")
        processes.begin()
        result = library.trace(url, seconds)
    else:
        from fusedstep.bench.trace_load import trace_model

        with console.progress(None) as progress:
            result = trace_model(options, vllm_args, seconds, progress)
    result_file.write_text(output, result.as_json(), option="--output")
    _print(result, output)


def _print(result: Trace, output: str) -> None:
    out = console.stdout()
    out.print(
        f"{result.windows} windows of {result.steps / max(result.windows, 1):.1f} steps, "
        f"{result.one_step_turns.total()} one-step turns, {result.arrivals} arrivals, "
        f"{result.first_tokens} first tokens"
    )
    for words, number in result.ends.most_common():
        out.print(f"{number:6} windows ended: {words}", markup=False)
    for reason, number in result.stock_steps.most_common():
        out.print(f"{number:6} stock steps: {reason}", markup=False)
    if result.full:
        out.print("the trace got too large: its last turns are missing; give fewer --seconds")
    out.print(f"{output}: open it in https://ui.perfetto.dev or chrome://tracing", markup=False)
