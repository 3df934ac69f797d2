"""The LoRA adapters of a window's rows, set by vLLM's own LoRA manager once per window."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.worker.gpu.lora_utils import create_lora_capture_hook

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner


class Adapters:
    """``stage`` with the window, ``apply`` when it begins.

    Not earlier: which adapter a row has is in static buffers, which the window in flight reads.
    Copies to them are in the order of the device's work. Where no adapters are allowed all of this
    does nothing.
    """

    def __init__(self, runner: GPUModelRunner) -> None:
        self.runner = runner
        self.num_active = 0  # of the staged batch
        self._set: Callable[[], None] | None = None

    @property
    def enabled(self) -> bool:
        return self.runner.lora_config is not None

    @property
    def graph_cases(self) -> list[int]:
        """Numbers of active adapters that vLLM has graphs for; 0 is one of them."""
        cases: list[int] = self.runner.lora_capture_cases
        return cases

    def stage(
        self,
        rows: np.ndarray,  # [num_reqs] int64, batch_idx -> req_state_idx
        num_tokens: int = 1,  # of a row in each step
    ) -> None:
        """Those of the coming window's requests."""
        if not self.enabled:
            return
        req_ids = map(self.runner.req_states.index_to_req_id.__getitem__, rows.tolist())
        of_each = np.full(len(rows), num_tokens, dtype=np.int32)
        of_rows, of_tokens, adapters = self.runner.lora_state.make_lora_inputs(
            list(req_ids), rows, of_each
        )
        of_logits = of_rows if num_tokens == 1 else of_tokens
        self.num_active = len(adapters)
        self._set = lambda: self.runner._set_active_loras(of_logits, of_tokens, adapters)

    def apply(self) -> None:
        if self._set is not None:
            self._set()

    def made_up(self) -> AbstractContextManager[None]:
        """Adapters without a file exist, as many as may be active, for ``make_up``."""
        context: AbstractContextManager[None]
        context = self.runner.maybe_setup_dummy_loras(self.runner.lora_config)
        return context

    def make_up(self, num_active: int, num_reqs: int) -> None:
        """``stage`` such adapters, as vLLM does for its graphs."""
        if not self.enabled:
            return
        self.num_active = num_active
        hook = create_lora_capture_hook(self.runner.lora_config, self.runner)
        self._set = partial(hook, num_active, num_reqs, num_reqs)
