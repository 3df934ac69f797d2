"""``fusedstep bench rollout``: RL rollouts, offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fusedstep.cli import console
from fusedstep.cli.bench_serve import bench
from fusedstep.cli.options import (
    MAX_TEMPERATURE,
    Real,
    VllmCommand,
    sampling_fields,
    split_model,
    window_options,
)

if TYPE_CHECKING:
    from fusedstep.bench.rollout_result import Comparison, Result
    from fusedstep.bench.spread import Spread
    from fusedstep.options import Options


@bench.command(cls=VllmCommand)
@click.option("--num-prompts", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--samples", type=click.IntRange(min=1), default=8, show_default=True, help="Of each prompt."
)
@click.option("--input-len", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--output-len",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens of the longest samples.",
)
@click.option(
    "--lengths",
    type=click.Choice(("ragged", "equal")),
    default="ragged",
    show_default=True,
    help="Ragged: log-normal, the median a quarter of --output-len. Equal: all as long as that.",
)
@click.option("--temperature", type=Real(0, MAX_TEMPERATURE), default=1, show_default=True)
@click.option(
    "--logprobs",
    type=click.Choice(("0", "1", "none")),
    default="0",
    show_default=True,
    help="0: of the sampled token; 1: of the most likely one, too.",
)
@click.option("--repeats", type=click.IntRange(min=2), default=5, show_default=True)
@click.option(
    "--sampling", callback=sampling_fields, metavar="JSON", help="Further sampling fields."
)
@click.option("--detokenize/--no-detokenize", default=True, help="Turn tokens into text.")
@window_options
@console.json_option
@click.pass_context
def rollout(
    ctx: click.Context,
    num_prompts: int,
    samples: int,
    input_len: int,
    output_len: int,
    lengths: Any,
    temperature: float,
    logprobs: str,
    repeats: int,
    sampling: dict[str, Any],
    detokenize: bool,
    options: Options,
    json_path: str | None,
    vllm_args: tuple[str, ...],
) -> None:
    """RL rollouts of stock vLLM and of fusedstep, alternating.

    Prompts with several samples each, every one with a seed and a length of its own. At most
    --max-num-seqs run at a time. Every other option goes to both vLLM engines. Exits with 1 when
    outputs differ.
    """
    from fusedstep.bench import rollout as library

    model, vllm_args = split_model(vllm_args)
    plan = library.Plan(
        num_prompts=num_prompts,
        samples=samples,
        input_len=input_len,
        output_len=output_len,
        lengths=lengths,
        temperature=temperature,
        logprobs=None if logprobs == "none" else int(logprobs),
        repeats=repeats,
        sampling=sampling,
        detokenize=detokenize and "--skip-tokenizer-init" not in vllm_args,
    )
    with console.progress(json_path) as progress:
        result = library.measure(model, plan, options, vllm_args, progress)
    if json_path is not None:
        console.write_json(json_path, {"complete": True} | result.as_dict())
    if json_path != "-":
        _print(result)
    ctx.exit(0 if result.comparison.agrees else 1)


def _print(result: Result) -> None:
    from rich.table import Table

    env, (stock, ours) = result.env, result.rows
    table = Table(
        title=f"{env['model']}, {env['device']}, {env['num_prompts']} x {env['samples']} samples, "
        f"K {env['decode_steps']}, {env['ops']} ops, {env['loop']} loop, vLLM {env['vllm']}"
    )
    table.add_column("")
    for heading in ("stock", "fusedstep", "ratio"):
        table.add_column(heading, justify="right")
    speedup = result.speedup
    table.add_row(
        "tokens/s",
        _cell(stock.tokens_per_s),
        _cell(ours.tokens_per_s),
        "outputs differ" if speedup is None else f"{speedup:.2f}",
    )
    for name in ("seconds", "tail_seconds"):
        a, b = getattr(stock, name), getattr(ours, name)
        words = {"seconds": "s", "tail_seconds": "tail, s"}[name]
        table.add_row(words, _cell(a), _cell(b), f"{b.p50 / a.p50:.2f}" if a.p50 else "")
    table.add_row("tail, share", f"{stock.tail_share.p50:.0%}", f"{ours.tail_share.p50:.0%}", "")
    reserved = ours.steps + ours.unused_steps
    unused = f"{ours.unused_steps} of {reserved} ({ours.unused_share:.1%})"
    table.add_row("steps reserved and not used", "", unused, "")
    table.add_row("rows that sat steps out", "", f"{ours.idle_share:.1%}", "")
    table.add_row("steps per window", "", f"{ours.steps / max(ours.windows, 1):.1f}", "")
    out = console.stdout()
    out.print(table)
    out.print(_agreement(result.comparison))
    out.print(
        f"Medians (min-max) of {env['repeats']} repeats. Tail: the time at the end in which less "
        "than a quarter of the rows are active. Steps: of windows, all repeats together; what is "
        "not used goes back. Rows sit out what is left of a window when they have ended."
    )


def _agreement(found: Comparison) -> str:
    who = {"oracle": "stock's Model Runner V2"}.get(found.oracle, "stock")
    words = f"{found.same} of {found.samples} samples have the tokens of {who} ({found.dtype})"
    if found.first_difference is not None:
        words += f"; the earliest difference is at token {found.first_difference}"
    if found.logprob_gap is not None:
        words += (
            f"; logprobs differ by {found.logprob_gap:.2g} at most, {found.logprob_tolerance:g} "
            "is allowed"
        )
    return f"{words}."


def _cell(spread: Spread) -> str:
    return f"{spread.p50:.2f} ({spread.min:.2f}-{spread.max:.2f})"
