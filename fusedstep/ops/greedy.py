"""Verification of drafts where every request takes the likeliest token."""

from __future__ import annotations

import torch


def verify_greedy(logits: torch.Tensor, drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes what vLLM's rejection sampler takes at temperature 0: of equal logits the lowest token.

    ``logits``: [num_reqs * (1 + d), V], behind each row's last token and behind each of its drafts.
    ``drafts``: [num_reqs, d] int64. Returns the tokens, [num_reqs, 1 + d] int64, and how many a row
    takes, [num_reqs] int32: the drafts that hold and one more. On a CPU: only there ``argmax`` says
    which of equal logits it takes.
    """
    num_reqs, num_drafts = drafts.shape
    tokens = logits.argmax(dim=-1).view(num_reqs, 1 + num_drafts)
    held = (tokens[:, :-1] == drafts).cumprod(dim=1)
    return tokens, 1 + held.sum(dim=1, dtype=torch.int32)
