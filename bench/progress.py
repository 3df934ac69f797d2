"""How a long command tells what it does, and keeps what it has found so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fusedstep.bench import result_file


def _nothing(_: Any) -> None:
    pass


@dataclass(frozen=True)
class Progress:
    """Called by what measures: ``say`` before each step, ``keep`` after each point."""

    say: Callable[[str], None] = _nothing
    keep: Callable[[dict[str, Any]], None] = _nothing  # the result so far, as its JSON


NO_PROGRESS = Progress()


def to(json_path: str | None, say: Callable[[str], None] | None = None) -> Progress:
    """Results so far go to this file (not to "-"); steps to ``say``, else to stderr as lines."""
    keep = _nothing if json_path in (None, "-") else partial(_keep, json_path)
    return Progress(say or partial(_line, time.monotonic()), keep)


def _keep(json_path: str, result: dict[str, Any]) -> None:
    result_file.write(json_path, {"complete": False} | result, so_far=True)


def _line(began: float, words: str) -> None:
    print(f"[{time.monotonic() - began:6.1f} s] {words}", file=sys.stderr, flush=True)
