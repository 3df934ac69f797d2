"""The options of fusedstep itself, all of them: frozen, checked, from one place."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fusedstep.errors import ConfigError
from fusedstep.policy import DecodeSteps

OPS = ("auto", "triton", "native", "reference")
LOOPS = ("auto", "while", "unrolled", "replay", "eager")
WINDOW_LATENCY_MS = 50.0


@dataclass(frozen=True)
class Options:
    """What a user may choose; everything else is decided from the device and the batch."""

    decode_steps: DecodeSteps
    ops: str = "auto"  # one of OPS: the implementation of the step operations
    loop: str = "auto"  # one of LOOPS: the form of the loop
    window_latency_ms: float = WINDOW_LATENCY_MS  # how much longer a stream may wait than in stock

    @classmethod
    def parse(cls, given: Mapping[str, object]) -> Options:
        """Values by name; one that is absent or None is FUSEDSTEP_<NAME>'s, else the default.

        Raises:
            ConfigError: an unknown name, or a wrong value, there or in the environment.
        """
        unknown = [name for name in given if name not in _PARSERS]
        if unknown:
            raise ConfigError(f"no option {unknown[0]!r} of fusedstep: use {', '.join(_PARSERS)}")
        return cls(**{name: _value(name, given.get(name)) for name in _PARSERS})

    def as_dict(self) -> dict[str, str]:
        """What ``parse`` takes: the form for ``additional_config["fusedstep"]``."""
        return {name: str(getattr(self, name)).removesuffix(".0") for name in _PARSERS}

    def check(self, *, on_cpu: bool) -> None:
        """Raises ConfigError for what this platform has not."""
        if on_cpu and self.loop not in ("auto", "eager"):
            raise ConfigError(f"--loop {self.loop} needs a GPU; use eager or auto")
        if not on_cpu and self.ops == "native":
            raise ConfigError("--ops native needs a CPU; use triton or auto")


def _one_of(name: str, allowed: tuple[str, ...], value: object) -> str:
    text = str(value).strip().lower()
    if text not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    return text


def _milliseconds(name: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"{name} must be a number of milliseconds above 0, not {value!r}")
    return number


_PARSERS: dict[str, Callable[[object], Any]] = {
    "decode_steps": DecodeSteps.parse,
    "ops": partial(_one_of, "ops", OPS),
    "loop": partial(_one_of, "loop", LOOPS),
    "window_latency_ms": partial(_milliseconds, "window_latency_ms"),
}
_DEFAULTS = {"window_latency_ms": WINDOW_LATENCY_MS}  # of the others: auto


def _value(name: str, given: object) -> Any:
    if given is not None:
        return _PARSERS[name](given)
    variable = f"FUSEDSTEP_{name.upper()}"
    try:
        return _PARSERS[name](os.environ.get(variable) or _DEFAULTS.get(name, "auto"))
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error}") from None
