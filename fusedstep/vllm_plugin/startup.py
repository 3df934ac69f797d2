"""One-line start-up errors collected from vLLM's child processes, and a quiet shutdown.

vLLM's engine core and workers log a traceback each and the parent only learns that something
failed. While a command starts an engine, the first process that fails writes its error into a
file that the command reads.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from fusedstep import processes
from fusedstep.errors import INTERRUPTED, ConfigError, FusedStepError
from fusedstep.vllm_plugin import compat

REASON_FILE = "FUSEDSTEP_REASON_FILE"
FAILURES = ("EngineCore failed to start", "WorkerProc failed to start")
SCHEDULER_CONFIG = "vllm.config.scheduler"
PROCESSES = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")


def first_line(error: BaseException) -> str:
    """One line that says what was wrong; pydantic hides it below its own headline."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if line.startswith("Value error, "):
            return line.removeprefix("Value error, ").split(" [type=")[0]
    if isinstance(error, (FusedStepError, ValueError, OSError, RuntimeError)) and lines:
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])  # KeyError: 'name'


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of vLLM's start, here or in its processes, become one ConfigError."""
    with tempfile.TemporaryDirectory(prefix="reason-", dir=processes.folder()) as folder:
        reason = Path(folder, "reason")
        os.environ[REASON_FILE] = str(reason)
        try:
            yield
        except FusedStepError:
            raise
        except Exception as error:
            if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
                raise
            known = reason.read_text() if reason.exists() else first_line(error)
            raise ConfigError(known) from None
        finally:
            os.environ.pop(REASON_FILE, None)


def report_failures() -> None:
    """In vLLM's processes: hand the first failure to the command instead of its traceback."""
    path = os.environ.get(REASON_FILE)
    if path is None:
        return

    def hand_over(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or not str(record.msg).startswith(FAILURES):
            return True
        with contextlib.suppress(OSError), open(path, "x") as file:  # the first one counts
            file.write(first_line(error))
        sys.stderr = io.StringIO()  # multiprocessing prints the traceback once more
        return False

    for name in PROCESSES:
        logging.getLogger(name).addFilter(hand_over)


def hush_our_scheduler() -> None:
    """vLLM warns of every scheduler that is not its own: ours is made for this version of it."""
    logging.getLogger(SCHEDULER_CONFIG).addFilter(_is_not_about_ours)


def _is_not_about_ours(record: logging.LogRecord) -> bool:
    return not (
        str(record.msg).startswith("Using custom scheduler class")
        and compat.SCHEDULER_CLS in map(str, record.args or ())
    )


def end_quietly() -> None:
    """For a server that is about to start: when it is interrupted, it just ends; SIGHUP is SIGTERM.

    vLLM 0.32 kills its engine core then and logs that it is dead, uvicorn logs each client that it
    cuts off, Python reports the shared memory that it cleans up, and nanobind Triton's types
    (Triton silences it in its own processes in the same way).
    """
    warnings = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, warnings))
    for source in (*logging.getLogger("vllm").handlers, logging.getLogger("uvicorn.error")):
        source.addFilter(_tells_more_than_the_end)
    atexit.register(_close_stderr)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def end_on_signals(before_end: Callable[[], None]) -> dict[int, Any]:
    """While the engine starts, SIGINT and SIGTERM end it at once; a running server has its own way.

    vLLM 0.32 catches a KeyboardInterrupt while it waits for its engine (zmq_socket_ctx).
    What has been started ends with this process (``processes.py``). Returns the former handlers.
    """

    def end(*_: Any) -> NoReturn:
        before_end()
        os._exit(INTERRUPTED)

    return {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}


class _Interrupted(BaseException):
    """A KeyboardInterrupt under a name that nobody catches."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While this program starts an engine, SIGINT ends the engine at once, and is then raised.

    vLLM 0.32 catches a KeyboardInterrupt while it waits for its engine (zmq_socket_ctx) and then
    waits for ten minutes: it is shown another exception.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    before = processes.started()

    def interrupt(*_: Any) -> NoReturn:
        processes.end_started(before)
        raise _Interrupted

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except _Interrupted:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _tells_more_than_the_end(record: logging.LogRecord) -> bool:
    """False for a dead engine (what killed it has been logged) and for clients cut off."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ not in ("EngineDeadError", "CancelledError")


def _close_stderr() -> None:
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
