"""``fusedstep verify``: the same requests through stock vLLM and through fusedstep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusedstep.cli import console
from fusedstep.cli.options import (
    VllmCommand,
    images_option,
    lora_option,
    sampling_fields,
    split_model,
    window_options,
)

if TYPE_CHECKING:
    from fusedstep.bench.verify import Report
    from fusedstep.options import Options


@click.command(cls=VllmCommand)
@click.option("--prompts", type=click.Path(path_type=Path), help="One prompt per line, or JSONL.")
@click.option("--limit", type=click.IntRange(min=1), help="Take the first so many prompts.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=48, show_default=True)
@click.option(
    "--sampling",
    callback=sampling_fields,
    metavar="JSON",
    help="Sampling fields for prompts that do not set them (vLLM's SamplingParams names).",
)
@images_option
@lora_option
@window_options
@click.option("--dtype", default="float32", show_default=True, help="The model's dtype.")
@console.json_option
@click.pass_context
def verify(
    ctx: click.Context,
    prompts: Path | None,
    limit: int | None,
    max_tokens: int,
    sampling: dict[str, Any],
    images: tuple[Path, ...],
    lora_modules: tuple[str, ...],
    options: Options,
    dtype: str,
    json_path: str | None,
    vllm_args: tuple[str, ...],
) -> None:
    """Check that fused decoding gives the same tokens as stock vLLM.

    Exits with 0 only if no request is DIFFERENT. Every other option goes to both vLLM engines.
    """
    from fusedstep.bench import adapters
    from fusedstep.bench import verify as library
    from fusedstep.bench.images import beside, find
    from fusedstep.bench.prompts import read_requests

    requests = beside(read_requests(prompts, sampling)[:limit], find(images))
    loras = adapters.find(lora_modules)
    model, vllm_args = split_model(vllm_args)
    with console.progress(json_path) as progress:
        report = library.verify(
            model, requests, max_tokens, options, dtype, vllm_args, progress, loras
        )
    if json_path is not None:
        console.write_json(json_path, {"complete": True} | report.as_dict())
    if json_path != "-":
        _print(report)
    ctx.exit(1 if report.count("DIFFERENT") else 0)


def _print(report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"identical": "green", "near-tie": "yellow", "DIFFERENT": "bold red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("verdict", "tokens", "prompt", "first difference"):
        table.add_column(heading)
    for item in report.items:
        detail = ""
        if item.at is not None:
            detail = f"at {item.at}: {item.stock_token} | {item.fusedstep_token}"
            if item.top_logprobs:
                detail += " (top " + ", ".join(f"{x:.5f}" for x in item.top_logprobs) + ")"
        table.add_row(
            Text(item.verdict, style=styles[item.verdict]),
            str(item.tokens),
            Text(" ".join(item.prompt.split())[:50]),
            detail,
        )
    out = console.stdout()
    out.print(table)
    oracle = {"stock": "stock vLLM", "oracle": "stock Model Runner V2"}[report.oracle]
    out.print(
        f"{len(report.items)} completions, {report.tokens} tokens against {oracle}: "
        f"{report.count('identical')} identical, {report.count('near-tie')} near-tie, "
        f"{report.count('DIFFERENT')} DIFFERENT; "
        f"{report.steps_per_window_mean:.1f} {'rounds' if report.num_drafts else 'steps'} per "
        f"window, {report.ops} ops, {report.loop} loop"
    )
    console.print_stock_steps(report.stock_steps)
