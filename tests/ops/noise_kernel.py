"""The Triton noise on its own, for the test that looks at it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedstep.kernels.noise import gumbel_noise, hash_prefix


@triton.jit
def _noise_kernel(seed_ptr, position_ptr, noise_ptr, BLOCK: tl.constexpr):
    prefix = hash_prefix(tl.load(seed_ptr), tl.load(position_ptr))
    token_ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(noise_ptr + token_ids, gumbel_noise(prefix, token_ids))


def triton_noise(seed: int, position: int, size: int, device: str) -> torch.Tensor:
    """Noise of the tokens below ``size``, a multiple of 1024."""
    noise = torch.empty(size, device=device)
    keys = torch.tensor([seed, position], device=device)
    _noise_kernel[(size // 1024,)](keys[:1], keys[1:], noise, BLOCK=1024)
    return noise.cpu()
