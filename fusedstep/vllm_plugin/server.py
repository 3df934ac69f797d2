"""vLLM's own OpenAI server with fusedstep underneath."""

from __future__ import annotations

import os
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusedstep.errors import ConfigError
from fusedstep.vllm_plugin import compat, startup, wiring
from fusedstep.vllm_plugin.register import SWITCH


@dataclass(frozen=True)
class Banner:
    """What a user should see before the server starts."""

    model: str
    device: str
    attention_backend: str
    decode_steps: str
    url: str
    versions: str
    kv_cache: str


def serve(
    model: str,
    decode_steps: str,
    stock: bool,
    vllm_args: Sequence[str],
    announce: Callable[[Banner], None],
) -> None:
    """Run the server until it is interrupted. ``vllm_args`` are ``vllm serve``'s own options.

    Raises ConfigError (one line) for anything that keeps it from starting.
    """
    compat.check_vllm_version()
    if stock:
        os.environ.pop(SWITCH, None)
    else:
        wiring.switch_on()
    with startup.one_line_errors():
        args = _parse(model, vllm_args)
        if not stock:
            options = wiring.engine_options(
                decode_steps, {k: v for k, v in vars(args).items() if v is not None}
            )
            for name in ("worker_cls", "scheduler_cls"):
                chosen = getattr(args, name)
                setattr(args, name, options[name] if chosen in (None, "auto") else chosen)
            args.additional_config = options["additional_config"]
        bounded = wiring.bounded_kv_cache(
            {k: v for k, v in vars(args).items() if _was_given(k, vllm_args)}
        )
        args.kv_cache_memory_bytes = bounded.get(
            "kv_cache_memory_bytes", args.kv_cache_memory_bytes
        )
        _check_model(args.model)
        _check_port(args.host, args.port)
        _check_worker(args, decode_steps)
        announce(_banner(args, decode_steps, stock))
        from vllm.entrypoints.cli.serve import ServeSubcommand

        ServeSubcommand.cmd(args)


def _parse(model: str, vllm_args: Sequence[str]) -> Namespace:
    """``vllm serve``'s parser, with a one-line error instead of its usage text."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="fusedstep serve"))

    def error(message: str) -> None:
        raise ConfigError(f"{message} (fusedstep serve takes every option of vllm serve)")

    parser.error = error
    args: Namespace = parser.parse_args([model, *vllm_args])
    args.model = args.model_tag
    args.subparser, args.host = "serve", args.host or "127.0.0.1"
    if args.served_model_name is None and Path(model).is_dir():
        args.served_model_name = [model, Path(model).name]
    validate_parsed_serve_args(args)
    return args


def _was_given(name: str, vllm_args: Sequence[str]) -> bool:
    """Did the user write this option?"""
    flag = "--" + name.replace("_", "-")
    return any(arg.split("=")[0].replace("_", "-") == flag for arg in vllm_args)


def _check_model(model: str) -> None:
    """A path that is not there would be taken for a name on the hub, and fail in ten lines."""
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path and not Path(model).expanduser().exists():
        raise ConfigError(
            f"no model at {model}: give a folder that exists, or a hub name (org/name)"
        )


def _check_port(host: str, port: int) -> None:
    """vLLM would find out too, after seconds of imports."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another --port"
            ) from None


def _check_worker(args: Namespace, decode_steps: str) -> None:
    """Our scheduler corrupts output under a runner that does not know windows: say so here."""
    ours = args.scheduler_cls == compat.SCHEDULER_CLS
    if ours and args.worker_cls != compat.WORKER_CLS and decode_steps != "1":
        raise ConfigError(
            f"FusedStepScheduler needs fusedstep's worker, not {args.worker_cls}: leave "
            "--worker-cls out (or fix --decode-steps at 1)"
        )


def _banner(args: Namespace, decode_steps: str, stock: bool) -> Banner:
    import torch
    from vllm.platforms import current_platform

    device = current_platform.get_device_name() if not current_platform.is_cpu() else "cpu"
    backend = args.attention_backend or ("CPU_ATTN" if current_platform.is_cpu() else "auto")
    kv_bytes = args.kv_cache_memory_bytes
    return Banner(
        model=str(args.model),
        device=device,
        attention_backend=str(getattr(backend, "name", backend)),
        decode_steps="stock vLLM" if stock else decode_steps,
        url=f"http://{args.host}:{args.port}/v1",
        versions=f"vLLM {compat.vllm_version()}, torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}",
        kv_cache=f"{kv_bytes / wiring.GIB:.1f} GiB" if kv_bytes else "sized by vLLM",
    )
