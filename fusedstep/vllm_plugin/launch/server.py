"""vLLM's own OpenAI server with fusedstep underneath."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fusedstep import demo, processes
from fusedstep.errors import ConfigError
from fusedstep.loop_forms import LoopForm
from fusedstep.options import Options
from fusedstep.vllm_plugin import compat, startup
from fusedstep.vllm_plugin.compat import SWITCH
from fusedstep.vllm_plugin.frontend import explain_route
from fusedstep.vllm_plugin.launch import arguments, cores, early, quiet, wiring

CLIENT_SECONDS = 2
# What vLLM's server returns to be awaited when no signal has ended it: its engine has died.
ENDED_BY_ITSELF = "dummy_shutdown"


@dataclass(frozen=True)
class Banner:
    """Facts to show when the server is up; ``ops`` and ``loop`` are empty for stock."""

    model: str
    device: str
    attention_backend: str
    decode_steps: str
    ops: str
    loop: str
    kv_cache: str
    cores: str
    versions: str
    url: str
    curl: str  # a first request, to paste


class Display(quiet.Display, Protocol):
    """The lines that ``quiet`` shows, and whose they are."""

    def about(self, banner: Banner) -> None: ...


def serve(
    options: Options, stock: bool, vllm_args: Sequence[str], display: Display, *, verbose: bool
) -> None:
    """Run the server until it is interrupted. ``vllm_args``: [MODEL] and ``vllm serve``'s options.

    vLLM's output goes to a log file, unless ``verbose``.

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
    alone = processes.folder() is None  # a measurement compares servers on the same cores
    on_cores = ""
    if alone and not stock and wiring.is_cpu_build():
        if crowded := cores.settle():
            display.warn(crowded)
        else:
            on_cores = cores.take_the_hosts()
    os.environ |= processes.environment()
    log = None if verbose or _asks_for_output(vllm_args) else quiet.log_file(_name(vllm_args))
    started: list[str] = []
    try:
        with quiet.output_to(log) if log else contextlib.nullcontext():
            _serve(options, stock, vllm_args, display, log, started, on_cores)
    except (ConfigError, SystemExit) as error:
        if log is not None and started:
            _tell_end(display, log, str(error))
        raise


def _serve(
    options: Options,
    stock: bool,
    vllm_args: Sequence[str],
    display: Display,
    log: Path | None,
    started: list[str],
    on_cores: str,
) -> None:
    """``started`` gets a word when vLLM itself runs, and has something to say."""
    watch = quiet.Watch(display, log)
    try:
        display.say("loading vLLM")
        with startup.one_line_errors():
            args = _parse(options, stock, vllm_args)
            if not args.uds:  # where to listen may be in a file of vLLM's --config
                early.check_port(args.host, args.port)
            display.about(_banner(args, stock, on_cores))
            watch.until(partial(_answers, args))
            display.say("starting the engine")
            started.append("vLLM")
            _run(args, display)
    finally:
        watch.end()
        display.restore()


def _tell_end(display: Display, log: Path, error: str) -> None:
    """The end of the log where the error alone says too little, and where the rest is."""
    if "root cause" in error or "has died" in error:
        for line in quiet.tail(log):
            display.warn(line)
    display.warn(f"vLLM's log: {log}")


def _asks_for_output(vllm_args: Sequence[str]) -> bool:
    """Is it help that is wanted, debugging output, or an engine without a server?"""
    words = ("--help", "-h", "--version", "-v", "--headless")
    asked = any(arg.partition("=")[0] in words for arg in vllm_args)
    return asked or os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG"


def _name(vllm_args: Sequence[str]) -> str:
    """A name for this server's log: one server at a time has it."""
    uds = early.value_of(vllm_args, "--uds")
    name = uds or early.value_of(vllm_args, "--port") or str(early.PORT)
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def _answers(args: Namespace) -> bool:
    """Does somebody listen? vLLM binds its socket at once, and listens when it is up."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", None: "127.0.0.1"}.get(args.host, args.host)
    try:
        if args.uds:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(args.uds)
        else:
            socket.create_connection((host, args.port), timeout=1).close()
    except OSError:
        return False
    return True


def _curl(args: Namespace) -> str:
    """A first request. A completion: not every model has a chat template."""
    name = (args.served_model_name or [args.model])[-1]
    body: dict[str, Any] = {"model": name, "prompt": "The capital of France is"}
    body |= {"max_tokens": 16, "temperature": 0}
    scheme = "https" if args.ssl_certfile else "http"
    where = f"{scheme}://{args.host}:{args.port}".replace("0.0.0.0", "127.0.0.1")
    words = ["curl", "-s", f"{where}/v1/completions"]
    if args.uds:
        words[2:] = ["--unix-socket", args.uds, "http://localhost/v1/completions"]
    words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    line = shlex.join(words)
    return f'{line} -H "Authorization: Bearer $VLLM_API_KEY"' if args.api_key else line


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
    if not stock:
        args.middleware = [*args.middleware, explain_route.OPTION]
    if args.served_model_name is None and Path(args.model).is_dir():
        bundled = Path(args.model) == demo.find_made()
        args.served_model_name = [args.model, demo.MODEL_NAME if bundled else Path(args.model).name]
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    return args


def _run(args: Namespace, display: Display) -> None:
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
        handlers.update(startup.end_on_signals(display.restore))
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
        raise SystemExit("fusedstep: the engine has died: its error is in the log")


def _banner(args: Namespace, stock: bool, on_cores: str) -> Banner:
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
        cores=on_cores,
        versions=f"vLLM {compat.vllm_version()}, torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}",
        url=args.uds or f"http://{args.host}:{args.port}/v1",
        curl=_curl(args),
    )
