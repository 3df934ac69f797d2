"""Options that several commands share."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fusedstep.cli.console import Command
from fusedstep.demo import demo_model
from fusedstep.options import LOOPS, NAMES, OPS, ROPES, WINDOW_LATENCY_MS, Options, flag
from fusedstep.vllm_plugin.launch import arguments, early, sources

MAX_TEMPERATURE = 2.0  # vLLM's


class VllmCommand(click.Command):
    """A command whose other arguments are vLLM's: passed on untouched, as ``vllm_args``.

    ``server``: it takes the options of vLLM's server too, not only the engine's.
    """

    def __init__(self, *args: Any, server: bool = False, **given: Any) -> None:
        super().__init__(*args, **given)
        self.server = server

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = {name: p for p in self.get_params(ctx) for name in (*p.opts, *p.secondary_opts)}
        ours: list[str] = []
        vllm_args: list[str] = []
        rest = iter(args)
        for arg in rest:
            name, equals, _ = arg.partition("=")
            option = options.get(name)
            if not isinstance(option, click.Option) or (option.is_flag and equals):
                vllm_args.append(arg)  # also --help=GROUP: vLLM's help
                continue
            ours.append(arg)
            if not option.is_flag and not equals:
                ours.extend(itertools.islice(rest, 1))
        unused = super().parse_args(ctx, ours)
        sources.check_options(vllm_args, server=self.server, ours=options)
        sources.check_speculation(vllm_args)
        ctx.params["vllm_args"] = tuple(vllm_args)
        return unused

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[MODEL]", *super().collect_usage_pieces(ctx), "[any vLLM option]..."]


class Group(click.Group):
    """A group that says which command was meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args[0] in names or args[0].startswith("-"):
            return super().resolve_command(ctx, args)
        hint = sources.did_you_mean(args[0], names) or f": use {', '.join(names)}"
        raise click.UsageError(f"No such command {args[0]!r}{hint}", ctx)


class Numbers(click.ParamType[tuple[Any, ...]]):
    """A comma-separated list of numbers, from ``least`` to ``most``."""

    def __init__(self, kind: Callable[[str], Any], least: float, most: float = math.inf) -> None:
        self.kind, self.least, self.most = kind, least, most
        self.name = f"{kind.__name__}[,...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(self.least <= number <= self.most for number in numbers):
            to = "up" if math.isinf(self.most) else f"to {self.most:g}"
            self.fail(f"want numbers from {self.least:g} {to}, comma-separated, not {value!r}")
        return numbers


class Real(click.FloatRange):
    """A number of a range, which nan is not."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number


images_option = click.option(
    "--images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="An image file, or a folder of them, for prompts; can be given more than once.",
)


lora_option = click.option(
    "--lora-modules",
    multiple=True,
    metavar="NAME=PATH",
    help="A LoRA adapter; can be given more than once. Requests take them in turn, and none.",
)


def window_options(command: Command) -> Command:
    """Add the options of ``Options`` to a command, as its parameter ``options: Options``."""

    default = "Default: FUSEDSTEP_{}, else auto."

    @click.option(
        "--decode-steps",
        metavar="auto|N",
        help=f"Decode steps per window, 1 to 64. {default.format('DECODE_STEPS')}",
    )
    @click.option(
        "--ops",
        type=click.Choice(OPS),
        help=f"Step operations; triton on a CPU is interpreted. {default.format('OPS')}",
    )
    @click.option(
        "--loop",
        type=click.Choice(LOOPS),
        help=f"Form of the loop; on a CPU it is eager. {default.format('LOOP')}",
    )
    @click.option(
        "--window-latency-ms",
        metavar="MS",
        help="How much longer a window may keep a stream waiting than a stock step does. "
        f"Default: FUSEDSTEP_WINDOW_LATENCY_MS, else {WINDOW_LATENCY_MS:g}.",
    )
    @click.option(
        "--rope",
        type=click.Choice(ROPES),
        help="fused: attention FUSEDSTEP norms and rotates queries and keys itself, of models that "
        "it knows; unproven on a GPU. Default: FUSEDSTEP_ROPE, else stock.",
    )
    @functools.wraps(command)
    def parsed(*args: Any, **given: Any) -> Any:
        options = Options.parse({name: given.pop(name) for name in NAMES}, flag)
        return command(*args, options=options, **given)

    return parsed  # type: ignore[return-value]


def split_model(vllm_args: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """MODEL (the bundled one without it) and the other arguments."""
    if vllm_args and not vllm_args[0].startswith("-"):
        early.check_folder(vllm_args[0])
        return vllm_args[0], vllm_args[1:]
    if not vllm_args:
        return str(demo_model()), ()
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    args = arguments.parse(arguments.engine_parser(), vllm_args)
    others = list(vllm_args)
    if args.model_tag is not None:
        others.remove(args.model_tag)
    early.check_folder(args.model)
    return args.model, tuple(others)


def sampling_fields(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> dict[str, Any]:
    """Callback of options that take sampling fields as a JSON object."""
    try:
        fields = json.loads(value or "{}")
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise click.BadParameter(f"want a JSON object, not {value!r}", ctx, param)
    return sources.sampling(str(param.opts[0]), fields)
