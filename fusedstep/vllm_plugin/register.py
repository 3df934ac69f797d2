"""vLLM's entry points: cheap, idempotent, silent unless fusedstep is switched on."""

from __future__ import annotations

import os

# Set by ``fusedstep serve`` and ``fusedstep.LLM``; inherited by every engine and worker process.
#   on: fusedstep's platform on the CPU;  oracle: stock Model Runner V2 made to run on the CPU.
SWITCH = "FUSEDSTEP"


def register() -> None:
    """``vllm.general_plugins``: called in every vLLM process, more than once."""
    from fusedstep.vllm_plugin import startup

    startup.report_failures()
    if os.environ.get(SWITCH) != "on":
        return
    from fusedstep.vllm_plugin.arrivals import announce_arrivals

    announce_arrivals()


def platform() -> str | None:
    """``vllm.platform_plugins``: our CPU platform where vLLM is a CPU build, else None.

    vLLM resolves its platform before it looks for Triton, in every process: this is the place
    to give Triton its stand-in.
    """
    mode = os.environ.get(SWITCH)
    if mode not in ("on", "oracle"):
        return None
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    from fusedstep.vllm_plugin import triton_cpu

    triton_cpu.install()
    name = "FusedStepCpuPlatform" if mode == "on" else "OracleCpuPlatform"
    return f"fusedstep.vllm_plugin.platform.{name}"
