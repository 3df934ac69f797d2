"""``fusedstep bench``: measurements against stock vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fusedstep.cli import console
from fusedstep.cli.options import (
    Numbers,
    VllmCommand,
    decode_steps_option,
    json_fields,
    split_model,
)

if TYPE_CHECKING:
    from fusedstep.bench.latency import Result


@click.group()
def bench() -> None:
    """Measure fused decoding against stock vLLM."""


@bench.command(cls=VllmCommand)
@click.option("--batch-size", type=Numbers(int, 1), default="1,8,32,64", show_default=True)
@click.option("--temperature", type=Numbers(float, 0), default="0,1", show_default=True)
@click.option("--input-len", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--output-len", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--repeats", type=click.IntRange(min=2), default=5, show_default=True)
@click.option(
    "--sampling",
    callback=json_fields,
    metavar="JSON",
    help="Further sampling fields where the temperature is above 0.",
)
@click.option("--detokenize/--no-detokenize", default=True, help="Turn tokens into text.")
@decode_steps_option
@console.json_option
def latency(
    batch_size: tuple[int, ...],
    temperature: tuple[float, ...],
    input_len: int,
    output_len: int,
    repeats: int,
    sampling: dict[str, Any],
    detokenize: bool,
    decode_steps: str,
    json_path: str | None,
    vllm_args: tuple[str, ...],
) -> None:
    """Decode cost per step of stock vLLM and of fusedstep, alternating.

    Prefill and constant costs cancel: each point is measured at two output lengths. Every other
    option (--load-format, --hf-overrides, --enforce-eager, ...) goes to both vLLM engines.
    """
    from fusedstep.bench import latency as library

    model, options = split_model(vllm_args)
    plan = library.Plan(
        batch_sizes=batch_size,
        temperatures=temperature,
        input_len=input_len,
        output_len=output_len,
        repeats=repeats,
        sampling=sampling,
        detokenize=detokenize and "--skip-tokenizer-init" not in options,
    )
    with console.stderr().status("preparing") as status:
        result = library.measure(model, plan, decode_steps, options, status.update)
    if json_path is not None:
        console.write_json(json_path, result.as_dict())
    if json_path != "-":
        _print(result)


def _print(result: Result) -> None:
    from rich.table import Table

    env = result.env
    table = Table(
        title=f"{env['model']}, {env['device']}, K {env['decode_steps']}, vLLM {env['vllm']}"
    )
    for heading in ("batch", "temperature"):
        table.add_column(heading, justify="right")
    for heading in ("stock", "fusedstep"):
        table.add_column(f"{heading}\nms/step", justify="right")
    for heading in ("speed-up", "tokens/s", "idle share"):
        table.add_column(heading, justify="right")
    for stock, ours in result.pairs():
        a, b = stock.ms_per_step, ours.ms_per_step
        ratio = f"{a.p50 / b.p50:.2f} ({a.min / b.max:.2f}-{a.max / b.min:.2f})"
        table.add_row(
            str(stock.batch_size),
            f"{stock.temperature:g}",
            f"{a.p50:.2f} ({a.min:.2f}-{a.max:.2f})",
            f"{b.p50:.2f} ({b.min:.2f}-{b.max:.2f})",
            ratio if ours.same_tokens else "outputs differ",
            f"{stock.tokens_per_s:.0f} -> {ours.tokens_per_s:.0f}",
            f"{stock.idle_share:.0%} -> {ours.idle_share:.0%}",
        )
    out = console.stdout()
    out.print(table)
    peak = result.peak_rss_mib
    out.print(
        f"peak memory of the worker: {peak['stock']:.0f} -> {peak['fusedstep']:.0f} MiB; "
        "spreads are min-max over the repeats"
    )
