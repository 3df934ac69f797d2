"""``fusedstep bench serve``: both servers under load, over HTTP."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from fusedstep.cli import console
from fusedstep.cli.bench import bench
from fusedstep.cli.options import MAX_TEMPERATURE, Real, VllmCommand, window_options
from fusedstep.errors import ConfigError

if TYPE_CHECKING:
    from fusedstep.bench.serving_result import Result, Row, Spread
    from fusedstep.options import Options

__all__ = ["bench", "serve"]  # the group, with the commands so far

NAMES = {
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "itl_ms": "ITL",
    "chunk_ms": "chunk gap",
    "e2el_ms": "E2EL",
    "output_tokens_per_s": "output tokens/s",
    "requests_per_s": "requests/s",
    "tokens_per_chunk": "tokens per chunk",
}
NOTE = (
    "Medians (min-max) of {repeats} repeats; ms but where it says otherwise. ITL is vLLM's: the "
    "time between two events of a stream, whatever number of tokens they carry; the time per token "
    "is TPOT. Ratios are fusedstep / stock."
)


class Bounds(click.ParamType[tuple[float, ...]]):
    """Comma-separated numbers above 0, or "inf"."""

    def __init__(self, *, whole: bool) -> None:
        self.whole, self.name = whole, "int|inf[,...]" if whole else "float|inf[,...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        fits = all(x > 0 and (not self.whole or x in (math.inf, x // 1)) for x in found)
        if not found or not fits:
            kind = "whole numbers" if self.whole else "numbers"
            self.fail(f"want {kind} above 0 or inf, comma-separated, not {value!r}")
        return found


@bench.command(cls=VllmCommand, server=True)
@click.option(
    "--rate",
    type=Bounds(whole=False),
    default="inf",
    show_default=True,
    help="Requests per second, Poisson; inf: all at once.",
)
@click.option(
    "--concurrency",
    type=Bounds(whole=True),
    default="16",
    show_default=True,
    help="Requests in flight at most; a request that waits for this is not yet sent.",
)
@click.option(
    "--dataset",
    type=click.Choice(("random", "file")),
    default="random",
    show_default=True,
    help="Random prompts of a fixed length, or those of --dataset-path, as they are.",
)
@click.option(
    "--dataset-path",
    type=click.Path(path_type=Path),
    help='One prompt per line, or JSONL with "prompt".',
)
@click.option("--num-prompts", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--input-len", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--output-len", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=Real(0, MAX_TEMPERATURE), default=0, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@window_options
@console.json_option
@console.html_option
@click.pass_context
def serve(
    ctx: click.Context,
    rate: tuple[float, ...],
    concurrency: tuple[float, ...],
    dataset: Any,
    dataset_path: Path | None,
    num_prompts: int,
    input_len: int,
    output_len: int,
    temperature: float,
    repeats: int,
    options: Options,
    json_path: str | None,
    html_path: str | None,
    vllm_args: tuple[str, ...],
) -> None:
    """Latency and throughput of stock and fusedstep servers under load.

    The load is that of `vllm bench serve`; every other option (--speculative-config, ...) goes to
    both servers. Without MODEL the bundled one is served. Exits with 1 when requests failed or
    greedy answers differ: any of them with --dtype float32, else all.
    """
    from fusedstep.bench import report
    from fusedstep.bench import serving as library

    if (dataset == "file") != (dataset_path is not None):
        raise ConfigError("--dataset file and --dataset-path FILE go together: give both")
    plan = library.Plan(
        rates=rate,
        concurrencies=concurrency,
        dataset=dataset,
        path=dataset_path,
        input_len=input_len,
        output_len=output_len,
        num_prompts=num_prompts,
        repeats=repeats,
        temperature=temperature,
    )
    with console.progress(json_path) as progress:
        result = library.measure(plan, options, vllm_args, progress)
    if json_path is not None:
        console.write_json(json_path, {"complete": True} | result.as_dict())
    if html_path is not None:
        console.write_html(html_path, report.of_serving(result))
    if json_path != "-":
        _print(result)
    ctx.exit(0 if result.comparable else 1)


def _print(result: Result) -> None:
    from rich.table import Table

    env = result.env
    table = Table(
        title=f"{env['model']}, {env['device']}, K {env['decode_steps']}, {env['dataset']} "
        f"prompts, vLLM {env['vllm']}"
    )
    for heading in ("requests/s", "at once"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for heading in ("stock", "fusedstep", "ratio"):
        table.add_column(heading, justify="right")
    for stock, ours in result.pairs():
        _add_load(table, result, stock, ours)
    out = console.stdout()
    out.print(table)
    out.print(NOTE.format(repeats=env["repeats"]))


def _add_load(table: Any, result: Result, stock: Row, ours: Row) -> None:
    """A line per figure; the load is named on the first."""
    reason = result.why_no_ratio(stock, ours)
    lines = zip(stock.figures(), ours.figures(), result.ratios(stock, ours), strict=True)
    for index, ((name, quantile, a), (_, _, b), (_, _, ratio)) in enumerate(lines):
        load = ("", "") if index else (f"{stock.rate:g}", f"{stock.concurrency:g}")
        shown = reason if reason and not index else f"{ratio:.2f}" if ratio is not None else ""
        table.add_row(*load, f"{NAMES[name]} {quantile}".rstrip(), _cell(a), _cell(b), shown)
    if (same := result.same_texts(stock, ours)) is not None:
        table.add_row("", "", "same texts", "", "{} of {}".format(*same), "")
    if any(share is not None for share in (*stock.accepted_drafts, *ours.accepted_drafts)):
        shares = (_share(stock.accepted_drafts), _share(ours.accepted_drafts))
        table.add_row("", "", "drafts that held", *shares, "")
    table.add_row("", "", "failed requests", str(stock.failed), str(ours.failed), "")
    table.add_section()


def _share(shares: tuple[float | None, ...]) -> str:
    """Their median, in percent; "-" of none."""
    known = [share for share in shares if share is not None]
    return f"{100 * median(known):.1f} %" if known else "-"


def _cell(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.min:.2f}-{spread.max:.2f})"
