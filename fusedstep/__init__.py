"""fusedstep: vLLM decoding with the host out of the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusedstep.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":  # vLLM is imported only when it is used
        from fusedstep.llm import LLM

        return LLM
    raise AttributeError(f"module 'fusedstep' has no attribute {name!r}")
