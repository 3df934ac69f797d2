"""The options of fusedstep itself, all of them: frozen, checked, from one place."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fusedstep.errors import ConfigError
from fusedstep.loop_forms import LoopForm
from fusedstep.policy import DecodeSteps

OPS = ("auto", "triton", "native", "reference")
LOOPS = ("auto", *(form.value for form in LoopForm))
ROPES = ("stock", "fused")
WINDOW_LATENCY_MS = 50.0


@dataclass(frozen=True)
class Options:
    """The user's choices; everything else is decided from the device and the batch."""

    decode_steps: DecodeSteps
    ops: str = "auto"  # one of OPS: the implementation of the step operations
    loop: str = "auto"  # one of LOOPS: the form of the loop
    window_latency_ms: float = WINDOW_LATENCY_MS  # how much longer a stream may wait than in stock
    rope: str = "stock"  # one of ROPES: where attention FUSEDSTEP gets rotated queries and keys
    spelled: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def parse(cls, given: Mapping[str, object], spelling: Callable[[str], str] = str) -> Options:
        """Values by name; one that is absent or None is FUSEDSTEP_<NAME>'s, else the default.

        ``spelling`` gives a name as the user wrote it (``flag``, ``config_key``): errors use it.

        Raises:
            ConfigError: an unknown name, or a wrong value, there or in the environment.
        """
        unknown = [name for name in given if name not in NAMES]
        if unknown:
            raise ConfigError(
                f"no option {spelling(unknown[0])} of fusedstep: use {', '.join(NAMES)}"
            )
        values, spelled = {}, {}
        for name, parse in _PARSERS.items():
            value, spelled[name] = given.get(name), spelling(name)
            if value is None:
                variable = f"FUSEDSTEP_{name.upper()}"
                if value := os.environ.get(variable):
                    spelled[name] = variable
                value = value or _DEFAULTS.get(name, "auto")
            values[name] = parse(spelled[name], value)
        return cls(**values, spelled=spelled)

    def as_dict(self) -> dict[str, str]:
        """The inverse of ``parse``: the form for ``additional_config["fusedstep"]``."""
        return {name: str(getattr(self, name)).removesuffix(".0") for name in NAMES}

    def check(self, *, on_cpu: bool) -> None:
        """Raises ConfigError for what this platform has not."""
        if on_cpu and self.loop not in ("auto", LoopForm.EAGER):
            raise ConfigError(f"{self.written('loop')} needs a GPU; use {LoopForm.EAGER} or auto")
        if not on_cpu and self.ops == "native":
            raise ConfigError(f"{self.written('ops')} needs a CPU; use triton or auto")

    def written(self, name: str) -> str:
        """The option and its value, as the user wrote it: ``--loop replay``."""
        return f"{self.spelled.get(name, name)} {getattr(self, name)}"


def flag(name: str) -> str:
    """How a command line spells the option."""
    return f"--{name.replace('_', '-')}"


def config_key(name: str) -> str:
    """How vLLM's ``--additional-config`` spells it."""
    return f'additional_config["fusedstep"]["{name}"]'


def _one_of(allowed: tuple[str, ...], name: str, value: object) -> str:
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


_PARSERS: dict[str, Callable[[str, object], Any]] = {  # (the name as it is spelled, the value)
    "decode_steps": lambda name, value: DecodeSteps.parse(value, name),
    "ops": partial(_one_of, OPS),
    "loop": partial(_one_of, LOOPS),
    "window_latency_ms": _milliseconds,
    "rope": partial(_one_of, ROPES),
}
NAMES = tuple(_PARSERS)
_DEFAULTS = {"window_latency_ms": WINDOW_LATENCY_MS, "rope": "stock"}  # of the others: auto
