"""vLLM's own OpenAI server with fusedstep underneath."""

from __future__ import annotations

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedstep import demo, processes
from fusedstep.loop_forms import LoopForm
from fusedstep.options import Options
from fusedstep.vllm_plugin import compat, startup
from fusedstep.vllm_plugin.compat import SWITCH
from fusedstep.vllm_plugin.launch import arguments, early, wiring

CLIENT_SECONDS = 2
# What vLLM's server returns to be awaited when no signal has ended it: its engine has died.
ENDED_BY_ITSELF = "dummy_shutdown"


@dataclass(frozen=True)
class Banner:
    """Facts to show before the server starts; ``ops`` and ``loop`` are empty for stock."""

    model: str
    device: str
    attention_backend: str
    decode_steps: str
    ops: str
    loop: str
    kv_cache: str
    versions: str
    url: str


def serve(
    options: Options, stock: bool, vllm_args: Sequence[str], announce: Callable[[Banner], None]
) -> None:
    """Run the server until it is interrupted. ``vllm_args``: [MODEL] and ``vllm serve``'s options.

    Raises:
        ConfigError: anything that keeps the server from starting, in one line.
        UnsupportedError: this vLLM version is not supported.
        KeyboardInterrupt: it was interrupted before it was up.
        SystemExit: 1, its engine has died, which stock vLLM's exit code does not tell.
    """
    compat.check_vllm_version()
    if not stock:
        wiring.check(options)
    early.check_server(vllm_args)
    if stock:
        os.environ.pop(SWITCH, None)
    else:
        wiring.switch_on(options)
    os.environ |= processes.environment()
    with startup.one_line_errors():
        args = _parse(options, stock, vllm_args)
        if not args.uds:  # where to listen may be in a file of vLLM's --config
            early.check_port(args.host, args.port)
        announce(_banner(args, stock))
        _run(args)


def _parse(options: Options, stock: bool, vllm_args: Sequence[str]) -> Namespace:
    """``vllm serve``'s arguments with fusedstep's worker, scheduler and options added."""
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.common.startup import cli_env_setup
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="fusedstep serve"))
    parser.set_defaults(subparser="serve", host="127.0.0.1")
    args = arguments.parse(parser, vllm_args)
    arguments.check_model(args)
    given = arguments.given(parser, args)
    vars(args).update(
        wiring.cpu_defaults(given) if stock else wiring.engine_options(options, given)
    )
    if args.served_model_name is None and Path(args.model).is_dir():
        bundled = Path(args.model) == demo.find_made()
        args.served_model_name = [args.model, demo.MODEL_NAME if bundled else Path(args.model).name]
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    return args


def _run(args: Namespace) -> None:
    """vLLM's server until it ends, which SIGINT and SIGTERM bring about at any time.

    vLLM's first action is to set a handler for SIGTERM: ours comes after that. At the end vLLM
    waits for its clients to hang up; a client of the engine that was just killed might wait too.
    """
    from vllm.entrypoints.cli import serve as cli
    from vllm.entrypoints.launchers.api_server import entry

    setup_server, stock_serve_http = entry.setup_server, entry.serve_http
    ended: list[str] = []

    stock_wait = cli.wait_for_completion_or_failure
    handlers: dict[int, Any] = {}

    def set_up(*args: Any, **kwargs: Any) -> Any:
        handlers.update(startup.end_on_signals())
        return setup_server(*args, **kwargs)

    def wait(*args: Any, **kwargs: Any) -> Any:
        """Of several API servers, which are up; one alone sets its own handlers."""
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return stock_wait(*args, **kwargs)

    async def serve_http(*args: Any, **kwargs: Any) -> Any:
        last = await stock_serve_http(*args, timeout_graceful_shutdown=CLIENT_SECONDS, **kwargs)
        ended.append(last.__name__)
        return last

    entry.setup_server, entry.serve_http = set_up, serve_http
    cli.setup_server, cli.wait_for_completion_or_failure = set_up, wait
    startup.end_quietly()
    cli.ServeSubcommand.cmd(args)
    if ENDED_BY_ITSELF in ended:
        raise SystemExit("fusedstep: the engine has died; its error is above")


def _banner(args: Namespace, stock: bool) -> Banner:
    """Known before the engine starts; the worker has the last word on attention."""
    import torch
    from vllm.platforms import current_platform

    from fusedstep.ops import dispatch

    on_cpu = current_platform.is_cpu()
    decode_steps, ops, loop = "stock vLLM", "", ""
    if not stock:
        options = Options.parse(args.additional_config["fusedstep"])
        choice = dispatch.resolve(torch.device(current_platform.device_type), options.ops)
        decode_steps, ops = str(options.decode_steps), f"{choice.name} ({choice.reason})"
        loop = LoopForm.EAGER.value if on_cpu else options.loop
    backend = args.attention_backend or ("CPU_ATTN" if on_cpu else "chosen by vLLM")
    kv_bytes = args.kv_cache_memory_bytes
    return Banner(
        model=args.model,
        device="cpu" if on_cpu else current_platform.get_device_name(),
        attention_backend=str(getattr(backend, "name", backend)),
        decode_steps=decode_steps,
        ops=ops,
        loop=loop,
        kv_cache=f"{kv_bytes / wiring.GIB:.2f} GiB" if kv_bytes else "sized by vLLM",
        versions=f"vLLM {compat.vllm_version()}, torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}",
        url=args.uds or f"http://{args.host}:{args.port}/v1",
    )
