"""``fusedstep serve``: vLLM's OpenAI server, decoding in windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fusedstep.cli import console
from fusedstep.cli.options import VllmCommand, window_options

if TYPE_CHECKING:
    from fusedstep.options import Options
    from fusedstep.vllm_plugin.launch.server import Banner


@click.command(cls=VllmCommand, server=True)
@window_options
@click.option("--stock", is_flag=True, help="Serve with stock vLLM, for comparison.")
def serve(options: Options, stock: bool, vllm_args: tuple[str, ...]) -> None:
    """Serve MODEL over the OpenAI API on 127.0.0.1:8000.

    Every other option goes to `vllm serve` untouched; --help=all lists them. Without MODEL the
    bundled SmolLM2-135M-Instruct is served.
    """
    from fusedstep.vllm_plugin.launch import server

    server.serve(options, stock, vllm_args, announce=_print)


def _print(banner: Banner) -> None:
    from rich.panel import Panel
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("model", banner.model),
        ("device", banner.device),
        ("attention", banner.attention_backend),
        ("decode steps", banner.decode_steps),
        ("ops", banner.ops),
        ("loop", banner.loop),
        ("KV cache", banner.kv_cache),
        ("versions", banner.versions),
        ("server", banner.url),
    ):
        if value:
            table.add_row(name, value)
    console.stderr().print(Panel(table, title="fusedstep serve", expand=False))
