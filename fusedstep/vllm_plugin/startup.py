"""Why an engine did not start, in one line, out of vLLM's processes.

vLLM's engine core and workers log a traceback each and the parent only learns that something
failed. While a command starts an engine, the first process that fails writes its error into a
file that the command reads.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fusedstep.errors import ConfigError, FusedStepError

REASON_FILE = "FUSEDSTEP_REASON_FILE"
FAILURES = ("EngineCore failed to start", "WorkerProc failed to start")
PROCESSES = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")


def first_line(error: BaseException | str) -> str:
    """One line that says what was wrong; pydantic hides it below its own headline."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if line.startswith("Value error, "):
            return line.removeprefix("Value error, ").split(" [type=")[0]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of vLLM's start, here or in its processes, become one ConfigError."""
    with tempfile.TemporaryDirectory(prefix="fusedstep-") as folder:
        reason = Path(folder, "reason")
        os.environ[REASON_FILE] = str(reason)
        try:
            yield
        except FusedStepError:
            raise
        except (ValueError, OSError, RuntimeError, AssertionError) as error:
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
