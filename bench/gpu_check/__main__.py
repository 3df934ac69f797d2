"""One call on a GPU: are fusedstep's tokens stock vLLM's in every form of its loop, what is gained?

    python -m fusedstep.bench.gpu_check --json result.json

Exit code 0 when every form was compared and none differed, 1 when not, 2 for bad input.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click
import torch

from fusedstep import processes
from fusedstep.bench import result_file
from fusedstep.bench.gpu_check.measure import MAX_BATCH_SIZE, Plan
from fusedstep.bench.gpu_check.models import SHAPES, TINY
from fusedstep.bench.gpu_check.report import Report, print_report
from fusedstep.bench.gpu_check.run import AUTO, Check
from fusedstep.errors import EXIT_CODE, INTERRUPTED, ConfigError, FusedStepError
from fusedstep.loop_forms import LoopForm
from fusedstep.vllm_plugin.launch import wiring

FORMS = (AUTO, *(form.value for form in LoopForm))
TEMPERATURES = (0.0, 1.0)
DEFAULT_MODEL = "qwen3-0.6b"
MOST_MINUTES = 24 * 60


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", type=click.Choice(("cuda", "cpu")), default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="A model of two layers and a short plan: try it out.")
@click.option(
    "--models",
    metavar="NAME|FOLDER,...",
    help=f"Of {', '.join(name for name in SHAPES if name != TINY)}, or folders.  "
    f"[default: {DEFAULT_MODEL}]",
)
@click.option("--batch-sizes", metavar="N,...", help="Default: 1,4,16,64,256; tiny: 1,4.")
@click.option(
    "--forms", default=",".join(FORMS), show_default=True, help="Of the loop; auto: what users get."
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=9.0,
    show_default=True,
    help="What does not fit is skipped, and said.",
)
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32")),
    help="Default: bfloat16 on a GPU, float32 on a CPU, where all tokens must be equal.",
)
@click.option("--json", "json_path", metavar="FILE", help="Written after every part.")
@click.pass_context
def command(
    ctx: click.Context,
    device: str,
    tiny: bool,
    models: str | None,
    batch_sizes: str | None,
    forms: str,
    repeats: int,
    minutes: float,
    dtype: str | None,
    json_path: str | None,
) -> None:
    """Compare every form of the loop with stock vLLM, token for token, and measure both.

    Random weights, prompts of token ids. Stock and fusedstep run side by side on one GPU, in turn.
    """
    _check_device(device)
    if not minutes <= MOST_MINUTES:  # nan is not, either
        raise ConfigError(f"--minutes: want a number up to {MOST_MINUTES}, not {minutes:g}")
    if json_path is not None:
        result_file.check(json_path)
    if tiny and models:
        raise ConfigError("--tiny is a model of its own: leave --models out")
    names = [TINY] if tiny else _split(models) or [DEFAULT_MODEL]
    plan = Plan(
        device=device,
        models=tuple(names),
        batch_sizes=_batch_sizes(batch_sizes or ("1,4" if tiny else "1,4,16,64,256")),
        temperatures=TEMPERATURES,
        forms=_forms(forms),
        repeats=repeats,
        minutes=minutes,
        dtype=dtype or ("bfloat16" if device == "cuda" else "float32"),
        input_len=8 if tiny else 32,
        short_len=16 if tiny else 64,
        long_len=80 if tiny else 192,
        equality_requests=13 if tiny else 24,
        equality_tokens=24 if tiny else 96,
    )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models are folders
    report = Check(plan, json_path, lambda line: click.echo(line, err=True)).run()
    print_report(report)
    ctx.exit(_exit_code(report))


def _exit_code(report: Report) -> int:
    return 0 if report.equal else 1


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here: use --device cpu --tiny to try the script out")
    if (device == "cpu") != wiring.is_cpu_build():
        build = "CPU" if wiring.is_cpu_build() else "CUDA"
        raise ConfigError(f"--device {device}: the installed vLLM is a {build} build")


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _batch_sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({int(part) for part in _split(text)}))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1 or sizes[-1] > MAX_BATCH_SIZE:
        raise ConfigError(f"--batch-sizes: want numbers from 1 to {MAX_BATCH_SIZE}, not {text!r}")
    return sizes


def _forms(text: str) -> tuple[str, ...]:
    forms = tuple(dict.fromkeys(_split(text)))
    if not forms or not set(forms) <= set(FORMS):
        raise ConfigError(f"--forms: use {', '.join(FORMS)}, not {text!r}")
    return forms


def main() -> NoReturn:
    """Errors are one line, and exit code 2."""
    try:
        sys.exit(command.main(prog_name="gpu_check", standalone_mode=False))
    except (FusedStepError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"error: {' '.join(message.split())}", err=True)
        sys.exit(EXIT_CODE)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    processes.interrupt_on_signals()
    main()
