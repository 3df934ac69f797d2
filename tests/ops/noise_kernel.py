"""The Triton noise on its own, for the tests that look at it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusedstep.kernels.noise import gumbel_noise, hash_prefix, near_scores


@triton.jit
def _noise_kernel(
    seed_ptr, position_ptr, logits_ptr, noise_ptr, scores_ptr, temperature, BLOCK: tl.constexpr
):
    prefix = hash_prefix(tl.load(seed_ptr), tl.load(position_ptr))
    token_ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + token_ids)
    tl.store(noise_ptr + token_ids, gumbel_noise(prefix, token_ids))
    tl.store(scores_ptr + token_ids, near_scores(logits, temperature, prefix, token_ids))


def triton_noise(seed: int, position: int, size: int, device: str) -> torch.Tensor:
    """Noise of the tokens below ``size``, a multiple of 1024."""
    return noise_and_scores(seed, position, torch.zeros(size), 1.0, device)[0]


def noise_and_scores(
    seed: int, position: int, logits: torch.Tensor, temperature: float, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact noise, and near scores times the temperature, of a multiple of 1024 tokens."""
    logits = logits.to(device)
    noise, scores = torch.empty_like(logits), torch.empty_like(logits)
    keys = torch.tensor([seed, position], device=device)
    grid = (logits.numel() // 1024,)
    _noise_kernel[grid](keys[:1], keys[1:], logits, noise, scores, temperature, BLOCK=1024)
    return noise.cpu(), scores.cpu()


@triton.jit
def no_bound(near_score, temperature):
    """A ``score_bound`` that says that nothing else can win."""
    return near_score * 0.0 + float("-inf")
