"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from fusedstep.errors import FusedStepError

# Options that a command does not know are vLLM's: they are passed on untouched.
PASS_ON = {"ignore_unknown_options": True, "allow_interspersed_args": True}


class Steps(click.ParamType[str]):
    """``auto`` or a window length."""

    name = "auto|N"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        from fusedstep.policy import DecodeSteps

        try:
            return str(DecodeSteps.parse(value))
        except FusedStepError as error:
            self.fail(str(error), param, ctx)


class Numbers(click.ParamType[tuple[Any, ...]]):
    """A comma-separated list of numbers."""

    def __init__(self, kind: Callable[[str], Any], least: float) -> None:
        self.kind, self.least, self.name = kind, least, f"{kind.__name__}[,...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < self.least:
            self.fail(f"want numbers from {self.least:g} up, comma-separated, not {value!r}")
        return numbers


decode_steps_option = click.option(
    "--decode-steps",
    type=Steps(),
    envvar="FUSEDSTEP_DECODE_STEPS",
    default="auto",
    show_default=True,
    help="Decode steps per window: a number from 1 to 64, or auto.",
)


def split_model(args: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """MODEL (the bundled one without it) and vLLM's options, from what click left over."""
    if args and not args[0].startswith("-"):
        return args[0], args[1:]
    return bundled_model(), args


def bundled_model() -> str:
    """Folder of SmolLM2-135M-Instruct, made on first use with a progress bar."""
    from fusedstep.demo import demo_model

    return str(demo_model())


def json_fields(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, Any]:
    """Callback of options that take a JSON object."""
    import json

    try:
        fields = json.loads(value or "{}")
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise click.BadParameter(f"want a JSON object, not {value!r}", ctx, param)
    return fields
