"""Stock vLLM's own top-k and top-p as part of our step, on a GPU.

Which of equal or nearly equal logits its kernels keep depends on the last bits of their float32
sums. No code but theirs has the same bits, so the step calls theirs.
"""

from __future__ import annotations

import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p


def truncate_as_stock(logits: torch.Tensor, limit_k: torch.Tensor, limit_p: torch.Tensor) -> None:
    """``ops.launch.Truncation`` by the function that vLLM's sampler calls."""
    masked = apply_top_k_top_p(logits, limit_k, limit_p)
    if masked is not logits:
        logits.copy_(masked)


def allocate_buffers(logits: torch.Tensor, limit_k: torch.Tensor, limit_p: torch.Tensor) -> None:
    """Have vLLM make its buffers, for the largest batch and for the smallest.

    It keeps them for the life of the process, but makes larger ones for a larger batch: recorded
    steps must never see that. The limits are off.
    """
    for num_rows in (len(logits), 1):
        truncate_as_stock(logits[:num_rows], limit_k[:num_rows], limit_p[:num_rows])
