"""Memory of the host that a GPU copies from and to without waiting."""

from __future__ import annotations

import torch


def host_zeros(*shape: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    """On the host, whatever torch's default device is: only host memory can be pinned."""
    return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=pinned)
