"""Errors that a user can act on.

Each carries a message of one line that says what to do next. The command line prints that line
without a traceback and exits with ``EXIT_CODE``.
"""

from __future__ import annotations

import sys

EXIT_CODE = 2
INTERRUPTED = 130  # what a shell reports for SIGINT


class FusedStepError(Exception):
    """Base of every error that fusedstep raises on purpose."""


class ConfigError(FusedStepError):
    """A setting, an argument or the installation is wrong; the message says how to put it right."""


class UnsupportedError(FusedStepError):
    """Valid, but this version or machine cannot do it; the message says what can."""


class TensorError(FusedStepError):
    """A tensor has a shape, dtype, stride or device that a kernel cannot take; it is named."""


class Refused(ConfigError, SystemExit):
    """A ConfigError in a program that is not ours: where nobody catches it, it ends the program.

    Its line is on stderr when it is raised: plain vLLM would bury it in a traceback, or in a
    thread.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = EXIT_CODE
        print(f"fusedstep: {message}", file=sys.stderr, flush=True)
