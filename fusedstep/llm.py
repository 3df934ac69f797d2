"""``fusedstep.LLM``: vllm.LLM with the wiring done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from inspect import signature
from typing import Any

from fusedstep import processes
from fusedstep.errors import ConfigError
from fusedstep.options import Options
from fusedstep.vllm_plugin import startup
from fusedstep.vllm_plugin.launch import sources, wiring

wiring.switch_on(Options.parse({}))

import vllm  # noqa: E402  (vLLM picks its platform at import: the switch comes first)
from vllm.engine.arg_utils import EngineArgs  # noqa: E402


class LLM(vllm.LLM):  # type: ignore[misc]
    """A ``vllm.LLM`` that decodes in windows of up to ``decode_steps`` steps.

    ``decode_steps``: "auto" or a number from 1 to 64; ``ops``, ``loop``, ``window_latency_ms``,
    ``rope``: see ``Options``. None leaves an option to the environment, else to its default. Every
    other argument is vLLM's. Its processes end with this one, even if it is killed.
    Raises ConfigError for a wrong name or value, UnsupportedError for a vLLM out of range.
    """

    def __init__(
        self,
        model: str,
        decode_steps: int | str | None = None,
        ops: str | None = None,
        loop: str | None = None,
        window_latency_ms: float | None = None,
        rope: str | None = None,
        **vllm_kwargs: Any,
    ) -> None:
        check_names(vllm_kwargs)
        options = Options.parse(
            {
                "decode_steps": decode_steps,
                "ops": ops,
                "loop": loop,
                "window_latency_ms": window_latency_ms,
                "rope": rope,
            }
        )
        completed = wiring.engine_options(options, vllm_kwargs)
        with processes.starting(), startup.interruptible():
            super().__init__(model, **completed)

    def window_stats(self) -> dict[str, Any]:
        """Windows, steps, tokens, and stock steps by reason since start (first worker)."""
        stats: dict[str, Any] = self.collective_rpc("window_stats")[0]
        return stats


def check_names(arguments: Iterable[str]) -> None:
    """Raises ConfigError for a name that neither we nor vLLM know."""
    known = {*signature(LLM.__init__).parameters, *signature(vllm.LLM.__init__).parameters}
    known |= {field.name for field in fields(EngineArgs)}
    for name in arguments:
        if name not in known:
            raise ConfigError(f"LLM has no argument {name}{sources.did_you_mean(name, known)}")
