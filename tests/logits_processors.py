"""The same custom logits processor for vLLM's two model runners: requests with ``extra_args``
{"odd": True} get tokens with odd ids only. Imports vLLM: for child processes."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor


def wants_odd(params: Any) -> bool:
    return bool((params.extra_args or {}).get("odd"))


class OddV1(AdapterLogitsProcessor):
    """For Model Runner V1."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        def odd(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[::2] = -torch.inf
            return logits

        return odd if wants_odd(params) else None


class OddV2(LogitsProcessor):
    """For Model Runner V2, and so for fusedstep."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.is_odd = torch.zeros(req_states.max_num_reqs, dtype=torch.bool)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.is_odd[req_idx] = wants_odd(sampling_params)
        return bool(self.is_odd[req_idx])

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        rows = self.is_odd[ctx.expanded_idx_mapping.long()]
        even = torch.arange(logits.shape[1]) % 2 == 0
        return logits.masked_fill_(rows[:, None] & even, -torch.inf)
