"""vLLM's cache of compiled models does not ask for fusedstep's options.

It is keyed by a hash of the whole configuration, ``additional_config`` included, where our options
travel to every process. No compiled model depends on them.
"""

from __future__ import annotations

from typing import Any

OURS = "fusedstep"


def leave_options_out() -> None:
    """Other values of --loop or --decode-steps find the model that is compiled already.

    So does stock vLLM, and we what it has compiled.
    """
    from vllm.config import VllmConfig

    stock = VllmConfig.compute_hash
    if getattr(stock, "leaves_out", None) == OURS:
        return

    def compute_hash(self: Any) -> str:
        given = self.additional_config
        if not isinstance(given, dict) or OURS not in given:
            return str(stock(self))
        self.additional_config = {name: value for name, value in given.items() if name != OURS}
        try:
            return str(stock(self))
        finally:
            self.additional_config = given

    compute_hash.leaves_out = OURS  # type: ignore[attr-defined]
    VllmConfig.compute_hash = compute_hash
