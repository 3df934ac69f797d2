"""``fusedstep serve``: vLLM's OpenAI server, decoding in windows."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusedstep.cli.options import VllmCommand, window_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from fusedstep.options import Options
    from fusedstep.vllm_plugin.launch.server import Banner

FILE_WIDTH = 160
SPINS = 5  # a second
SHOW_CURSOR = b"\r\x1b[2K\x1b[?25h"


@click.command(cls=VllmCommand, server=True)
@window_options
@click.option("--stock", is_flag=True, help="Serve with stock vLLM, for comparison.")
@click.option("--verbose", is_flag=True, help="Show all of vLLM's log.")
def serve(options: Options, stock: bool, verbose: bool, vllm_args: tuple[str, ...]) -> None:
    """Serve MODEL over the OpenAI API on 127.0.0.1:8000.

    Every other option goes to `vllm serve` untouched; --help=all lists them. Without MODEL the
    bundled SmolLM2-135M-Instruct is served.
    """
    from fusedstep.vllm_plugin.launch import server

    server.serve(options, stock, vllm_args, Display(plain=verbose), verbose=verbose)


class Display:
    """The start of a server: a line that changes on a terminal, else a line for each stage.

    It has a descriptor of its own: stdout and stderr go to the log.
    """

    def __init__(self, *, plain: bool) -> None:
        from rich.console import Console

        self.began = time.monotonic()
        self.number = os.dup(2)
        self.console = Console(file=os.fdopen(self.number, "w"), highlight=False)
        if not self.console.is_terminal:
            self.console.width = FILE_WIDTH  # there is no edge to wrap at
        self.changes = self.console.is_terminal and not plain
        self.live: Live | None = None
        self.banner: Banner | None = None
        self.said = ""

    def say(self, words: str) -> None:
        """The stage that begins now; one that is said again goes on."""
        if words == self.said:
            return
        self.said = words
        if not self.changes:
            self.print(f"[{time.monotonic() - self.began:6.1f} s] {words}")
        else:
            self._change(words)

    def _change(self, words: str) -> None:
        """The line on the terminal. rich would take stdout and stderr for it, which the log has."""
        from rich.live import Live
        from rich.spinner import Spinner

        spinner = Spinner("dots", words)
        if self.live is None:
            self.live = Live(
                spinner,
                console=self.console,
                refresh_per_second=SPINS,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self.live.start()
        else:
            self.live.update(spinner)

    def warn(self, words: str) -> None:
        self.print(words, style="yellow")

    def about(self, banner: Banner) -> None:
        """The server that is about to start, in words."""
        self.banner = banner

    def ready(self, log: Path | None, warnings: int) -> None:
        """The panel, and a request to paste."""
        self.restore()
        if self.banner is not None:
            _print(self.banner, log, warnings, self.console)
            self.print(f"\n{self.banner.curl}\n")

    def restore(self) -> None:
        """No line that changes any more. Also called by a process that ends at once."""
        live, self.live = self.live, None
        if live is not None:
            live.stop()
            os.write(self.number, SHOW_CURSOR)

    def print(self, words: str, style: str | None = None) -> None:
        self.console.print(words, style=style, markup=False, soft_wrap=True)


def _print(banner: Banner, log: Path | None, warnings: int, to: Console) -> None:
    from rich.panel import Panel
    from rich.table import Table

    said = f" ({warnings} warnings)" if warnings else ""
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("model", banner.model),
        ("device", banner.device),
        ("attention", banner.attention_backend),
        ("decode steps", banner.decode_steps),
        ("ops", banner.ops),
        ("loop", banner.loop),
        ("KV cache", banner.kv_cache),
        ("cores", banner.cores),
        ("versions", banner.versions),
        ("log", f"{log}{said}" if log else ""),
        ("server", banner.url),
    ):
        if value:
            table.add_row(name, value)
    to.print(Panel(table, title="fusedstep serve is ready", expand=False))
