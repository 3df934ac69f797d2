"""``fusedstep bench``: measurements against stock vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusedstep.cli import console
from fusedstep.cli.options import (
    MAX_TEMPERATURE,
    Group,
    Numbers,
    VllmCommand,
    images_option,
    lora_option,
    sampling_fields,
    split_model,
    window_options,
)

if TYPE_CHECKING:
    from fusedstep.bench.kernels import attention as attention_library
    from fusedstep.bench.kernels import step as kernels_library
    from fusedstep.bench.latency import Result
    from fusedstep.bench.spread import Spread
    from fusedstep.options import Options


@click.group(cls=Group)
def bench() -> None:
    """Measure fused decoding against stock vLLM."""


@bench.command(cls=VllmCommand)
@click.option("--batch-size", type=Numbers(int, 1), default="1,8,32,64", show_default=True)
@click.option(
    "--temperature", type=Numbers(float, 0, MAX_TEMPERATURE), default="0,1", show_default=True
)
@click.option("--input-len", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--output-len", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--repeats", type=click.IntRange(min=2), default=5, show_default=True)
@click.option(
    "--sampling",
    callback=sampling_fields,
    metavar="JSON",
    help="Further sampling fields where the temperature is above 0.",
)
@click.option("--detokenize/--no-detokenize", default=True, help="Turn tokens into text.")
@click.option(
    "--prompts",
    "prompts_path",
    type=click.Path(path_type=Path),
    help="Prompts in the place of random tokens, one per line or JSONL: each repeat runs them all.",
)
@click.option(
    "--without-drafts",
    is_flag=True,
    help="With --speculative-config: measure fusedstep without it, too.",
)
@images_option
@lora_option
@window_options
@console.json_option
@console.html_option
def latency(
    batch_size: tuple[int, ...],
    temperature: tuple[float, ...],
    input_len: int,
    output_len: int,
    repeats: int,
    sampling: dict[str, Any],
    detokenize: bool,
    prompts_path: Path | None,
    without_drafts: bool,
    images: tuple[Path, ...],
    lora_modules: tuple[str, ...],
    options: Options,
    json_path: str | None,
    html_path: str | None,
    vllm_args: tuple[str, ...],
) -> None:
    """Decode cost per step of stock vLLM and of fusedstep, alternating.

    Prefill and constant costs cancel: each point is measured at two output lengths. Every other
    option (--load-format, --speculative-config, --enforce-eager, ...) goes to both vLLM engines.
    """
    from fusedstep.bench import adapters, report
    from fusedstep.bench import latency as library
    from fusedstep.bench.images import find
    from fusedstep.bench.prompts import read_requests

    model, vllm_args = split_model(vllm_args)
    plan = library.Plan(
        batch_sizes=batch_size,
        temperatures=temperature,
        input_len=input_len,
        output_len=output_len,
        repeats=repeats,
        sampling=sampling,
        detokenize=detokenize and "--skip-tokenizer-init" not in vllm_args,
        images=find(images),
        adapters=adapters.find(lora_modules),
        prompts=tuple(read_requests(prompts_path, {})) if prompts_path is not None else (),
        without_drafts=without_drafts,
    )
    with console.progress(json_path) as progress:
        result = library.measure(model, plan, options, vllm_args, progress)
    if json_path is not None:
        console.write_json(json_path, {"complete": True} | result.as_dict())
    if html_path is not None:
        console.write_html(html_path, report.of_latency(result))
    if json_path != "-":
        _print(result)


def _print(result: Result) -> None:
    from rich.table import Table

    env = result.env
    table = Table(
        title=f"{env['model']}, {env['device']}, K {env['decode_steps']}, {env['ops']} ops, "
        f"{env['loop']} loop, vLLM {env['vllm']}"
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
    if accepted := env.get("accepted_drafts"):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in accepted.items())
        out.print(f"drafts that held, of all points: {shares}; a step is a token of each request")
    for (stock, ours), plain in zip(result.pairs(), result.plain, strict=False):
        c, b = plain.ms_per_step, ours.ms_per_step
        same = plain.same_tokens and ours.same_tokens
        ratio = f"{c.p50 / b.p50:.2f} ({c.min / b.max:.2f}-{c.max / b.min:.2f})"
        out.print(
            f"batch {stock.batch_size}, temperature {stock.temperature:g}: fusedstep without "
            f"drafts {c.p50:.2f} ({c.min:.2f}-{c.max:.2f}) ms/step, with them "
            + (f"{ratio} times as fast" if same else "outputs differ")
        )
    console.print_stock_steps(env.get("stock_steps", {}))


@bench.command()
@click.option(
    "--device",
    type=click.Choice(("cpu", "cuda")),
    help="Default: cuda if there is a GPU, else cpu.",
)
@click.option("--vocab-size", type=click.IntRange(min=100), default=151936, show_default=True)
@click.option("--batch-size", type=Numbers(int, 1), default="1,8,64", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32")),
    default="bfloat16",
    show_default=True,
    help="Of the logits, of the KV cache.",
)
@click.option("--repeats", type=click.IntRange(min=2), default=50, show_default=True)
@click.option(
    "--only",
    type=click.Choice(("step", "attention")),
    default="step",
    show_default=True,
    help="What to measure: the step after lm_head, or a layer's decode attention (on a GPU).",
)
@click.option(
    "--context",
    type=Numbers(int, 1),
    default="128,1024,4096,32768",
    show_default=True,
    help="Tokens of each row, for attention.",
)
@click.option(
    "--case",
    "cases",
    multiple=True,
    help="Only this case, may be repeated: greedy, temperature, top_p, top_k_top_p, min_p, "
    "penalties, logprobs, top_p_flat; of attention qwen3-0.6b, llama-1b, llama-8b.",
)
@click.option(
    "--static",
    "target",
    type=click.Choice(("sm_80", "sm_90", "sm_100", "gfx942")),
    help="Measure nothing: compile both sides' kernels for this GPU, which need not be here, and "
    "count their instructions.",
)
@console.json_option
def kernels(
    device: str | None,
    vocab_size: int,
    batch_size: tuple[int, ...],
    dtype: str,
    repeats: int,
    only: str,
    context: tuple[int, ...],
    cases: tuple[str, ...],
    target: str | None,
    json_path: str | None,
) -> None:
    """One decode step's work between lm_head and the next forward, alternating.

    Stock vLLM's kernels for it, ours, and the floor: the time in which the memory could deliver
    what must be read. Needs no model. With --only attention: vLLM's TRITON_ATTN and FLASH_ATTN
    against FUSEDSTEP in one layer. With --static sm_90: both sides' registers and instructions.
    """
    if target is not None:
        _static(target, cases, batch_size, context, json_path)
        return
    import torch

    from fusedstep.bench.kernels import step as library

    if only == "attention":
        _attention(
            library.pick_device(device), cases, batch_size, context, dtype, repeats, json_path
        )
        return

    plan = library.Plan(
        device=library.pick_device(device),
        cases=library.pick_cases(cases),
        batch_sizes=batch_size,
        vocab_size=vocab_size,
        dtype=getattr(torch, dtype),
        repeats=repeats,
    )
    with console.progress(json_path) as progress:
        result = library.measure(plan, progress)
    if json_path is not None:
        console.write_json(json_path, {"complete": True} | result.as_dict())
    if json_path != "-":
        _print_kernels(result)


def _print_kernels(result: kernels_library.Result) -> None:
    from rich.table import Table

    env, on_gpu = result.env, result.env["device_type"] == "cuda"
    table = Table(
        title=f"{env['device']}, {env['vocab_size']} {env['dtype']} logits, vLLM {env['vllm']}"
    )
    table.add_column("case")
    table.add_column("batch", justify="right")
    for name in ("stock", "fusedstep"):
        table.add_column(f"{name}\nus/step", justify="right")
    headings = ["ratio", "GB/s", "% of floor"] + ["stock unseeded", "kernels"] * on_gpu
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in result.rows:
        cells = [
            row.case,
            str(row.batch_size),
            _time(row.stock_us, row.stock_captured),
            _time(row.fusedstep_us, row.fusedstep_captured),
            _ratio(row),
            f"{row.gb_per_s:.1f}",
            f"{row.floor_share:.1%}",
        ]
        if on_gpu:
            cells.append(_time(row.stock_unseeded_us, row.stock_unseeded_captured))
            cells.append(f"{row.stock_launches} -> {row.fusedstep_launches}")
        table.add_row(*cells)
    out = console.stdout()
    out.print(table)
    out.print(_GPU_NOTE if on_gpu else _CPU_NOTE)
    if any(row.num_tied for row in result.rows):
        out.print(_TIE_NOTE)
    out.print(
        f"Times are p50 (p20-p80) of {env['repeats']} repeats; memory: "
        f"{result.bandwidth_gb_per_s:.1f} GB/s; logits in turn from "
        f"{min(row.logits_mib for row in result.rows):.0f} MiB or more."
    )


def _attention(
    device: Any,
    cases: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    contexts: tuple[int, ...],
    dtype: str,
    repeats: int,
    json_path: str | None,
) -> None:
    import torch

    from fusedstep.bench.kernels import attention as library

    plan = library.Plan(
        device, library.pick_cases(cases), batch_sizes, contexts, getattr(torch, dtype), repeats
    )
    with console.progress(json_path) as progress:
        result = library.measure(plan, progress)
    if json_path is not None:
        console.write_json(json_path, {"complete": True} | result.as_dict())
    if json_path != "-":
        _print_attention(result)


def _print_attention(result: attention_library.Result) -> None:
    from rich.table import Table

    env = result.env
    table = Table(title=f"{env['device']}, {env['dtype']} KV cache, vLLM {env['vllm']}")
    table.add_column("case")
    headings = ("batch", "context", "TRITON_ATTN\nus", "FLASH_ATTN\nus", "FUSEDSTEP\nus")
    for heading in (*headings, "to Triton", "to Flash", "GB/s", "% of floor"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        ratios = (row.triton_ratio, row.flash_ratio)
        table.add_row(
            row.case,
            str(row.batch_size),
            str(row.context),
            *(_time(spread, None) for spread in (row.triton_us, row.flash_us, row.fusedstep_us)),
            *("differs" if row.differs else f"{r:.2f}" if r else "" for r in ratios),
            f"{row.gb_per_s:.1f}",
            f"{row.floor_share:.1%}",
        )
    out = console.stdout()
    out.print(table)
    for line in result.left_out:
        out.print(line)
    out.print(
        f"One layer with its cache write, in CUDA graphs; p50 (p20-p80) of {env['repeats']} "
        f"repeats; memory: {result.bandwidth_gb_per_s:.1f} GB/s."
    )


def _static(
    target: str,
    cases: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    contexts: tuple[int, ...],
    json_path: str | None,
) -> None:
    from rich.table import Table

    from fusedstep.bench.kernels import static as library

    context, chosen = click.get_current_context(), click.core.ParameterSource.COMMANDLINE
    for name in ("device", "vocab_size", "dtype", "repeats", "only"):
        if context.get_parameter_source(name) is chosen:
            option = name.replace("_", "-")
            raise click.UsageError(f"--static measures nothing: leave out --{option}", context)
    with console.progress(json_path) as progress:
        result = library.measure(target, cases, batch_sizes, contexts, progress)
    if json_path is not None:
        console.write_json(json_path, {"complete": True} | result.as_dict())
    if json_path == "-":
        return
    table = Table(title=f"{target}, Triton {result.triton}, bf16: compiled, not run")
    for heading in ("case", "side", "kernel"):
        table.add_column(heading)
    for heading in _STATIC_COLUMNS:
        table.add_column(heading.replace("_", "\n"), justify="right")
    for row in result.rows:
        numbers = [getattr(row, name) for name in _STATIC_COLUMNS]
        cells = ["" if number is None else f"{number:.0f}" for number in numbers]
        table.add_row(row.case, row.side, row.kernel, *cells)
    times = Table(title="attention of a layer by the time model, us: not calibrated")
    for heading in ("case", "batch", "context", "floor", "FUSEDSTEP"):
        times.add_column(heading, justify="left" if heading == "case" else "right")
    for time in result.times:
        us = (f"{time.floor_us:.1f}", f"{time.fusedstep_us:.1f}")
        times.add_row(time.case, str(time.batch_size), str(time.context), *us)
    out = console.stdout()
    out.print(table)
    out.print(times)
    out.print(_STATIC_NOTE)


_STATIC_COLUMNS = (
    "registers",
    "local",
    "shared",
    "programs_per_sm",
    "load_bytes",
    "loads_before",
    "barriers_before",
    "main_loop",
    "size",
    "per_64_tokens",
)
_STATIC_NOTE = (
    "local: bytes of a thread in memory. Before: loads and barriers before the first load into "
    "shared memory, or before the first of the widest loads. Loops and size are in instructions of "
    "a warp. The time model compares versions, nothing else: an H100 took half as long again."
)
_CPU_NOTE = (
    "Stock is the sampler of vLLM's CPU runner alone: its input preparation and bookkeeping, "
    "Python in the runner, are left out; ours does all of it. Stock draws noise of its own: "
    "sampled tokens were compared with what our noise picks from its processed logits. Freed "
    "memory is kept, as by tcmalloc, and torch has all cores but one, as in vLLM's worker."
)
_GPU_NOTE = (
    "Stock is Model Runner V2's device work of a step with seeded requests, without its host work; "
    "both are CUDA graphs unless marked eager. Stock unseeded: FlashInfer's sampler, where vLLM "
    "would choose it for requests without a seed (other noise, not compared)."
)
_TIE_NOTE = (
    "Tied: tokens differ where equal logits lie at the cut of top-k or top-p; vLLM does not define "
    "which of them stay."
)


def _ratio(row: kernels_library.Row) -> str:
    if row.ratio is None:
        return f"{row.num_different}/{row.num_compared} differ"
    return f"{row.ratio:.2f}" + f" ({row.num_tied} tied)" * (row.num_tied > 0)


def _time(spread: Spread | None, captured: bool | None) -> str:
    if spread is None:
        return ""
    text = f"{spread.p50:.1f} ({spread.p20:.1f}-{spread.p80:.1f})"
    return text + " eager" * (captured is False)
