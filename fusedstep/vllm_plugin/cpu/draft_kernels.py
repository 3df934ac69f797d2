"""Stand-ins, as in ``stock_kernels``, for the kernels that verify drafts and prepare drafters.

Interpreted they take most of a speculative step. Watermarks and float64 noise are left to vLLM's
kernel, interpreted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fusedstep.ops import native_sample
from fusedstep.ops.native import flat_logits
from fusedstep.vllm_plugin.cpu import native_draft_kernels as native

Array = npt.NDArray[Any]


def _arrays(*args: Any) -> list[Any]:
    return [arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in args]


def expand_idx_mapping(*args: Any, **_constants: Any) -> None:
    """``_expand_idx_mapping_kernel``."""
    native.expand_idx_mapping(*_arrays(*args[:4]))


def gather_draft_sampled(*args: Any, **_constants: Any) -> None:
    """``_gather_draft_sampled_kernel``."""
    native.gather_draft_sampled(*_arrays(*args[:8]))


def flatten_sampled(*args: Any, **_constants: Any) -> None:
    """``_flatten_sampled_kernel``."""
    native.flatten_sampled(*_arrays(*args[:5]))


def logits_stats(*args: Any, BLOCK_SIZE: int, HAS_DRAFT_LOGITS: bool, **_constants: Any) -> None:
    """``_compute_local_logits_stats_kernel``: of each block of a row that verifies a draft.

    Greedy rows get maximum and argmax, others the sum of exp(logit - maximum) too.
    """
    argmax, _, *stats = args[:10]
    target_logits, _, draft_logits, _, _, idx_mapping, local_pos, temperatures = args[10:18]
    vocab_size, num_steps = args[18:20]  # vLLM 0.33 gives the number of logits instead of steps
    if HAS_DRAFT_LOGITS:
        num_steps = draft_logits.shape[1]
    maxima, sums, draft_maxima, draft_sums = _arrays(*stats[::2])
    is_greedy = temperatures[idx_mapping] == 0
    native.block_maxima(
        *(flat_logits(target_logits), target_logits.stride(0), vocab_size, BLOCK_SIZE),
        *_arrays(local_pos, num_steps, is_greedy, argmax, maxima),
    )
    for row in (~is_greedy & (local_pos < num_steps)).nonzero()[:, 0].tolist():
        logits = target_logits[row, :vocab_size].float().numpy()
        _sum_blocks(logits, BLOCK_SIZE, maxima[row], sums[row])
        if HAS_DRAFT_LOGITS:
            req, step = idx_mapping[row], local_pos[row]
            logits = (draft_logits[req, step, :vocab_size].float() / temperatures[req]).numpy()
            starts = np.arange(0, vocab_size, BLOCK_SIZE)
            draft_maxima[row] = np.maximum.reduceat(logits, starts)
            _sum_blocks(logits, BLOCK_SIZE, draft_maxima[row], draft_sums[row])


def _sum_blocks(row: Array, size: int, maxima: Array, sums: Array) -> None:
    for n, top in enumerate(maxima):
        block = row[n * size : (n + 1) * size]
        sums[n] = np.exp(block - top).sum() if top > -np.inf else 0.0


def _drafter_s(
    draft_logits: torch.Tensor, reqs: torch.Tensor, steps: torch.Tensor, temperatures: torch.Tensor
) -> torch.Tensor:
    """A drafter's logits, [n, V] float32: they are kept as they were before the temperature."""
    return draft_logits[reqs.long(), steps.long()].float() / temperatures[reqs, None]


def _blocks(
    maxima: torch.Tensor, sums: torch.Tensor, logits: torch.Tensor
) -> tuple[Array, Array, Array]:
    return maxima.numpy(), sums.numpy(), logits.numpy()


def _verified(
    target: list[Any], drafter: list[Any], drafts: torch.Tensor, batch: list[Any]
) -> tuple[Any, Any]:
    """Of target and drafter: their rows' blocks, and each draft's logit beside its row.

    ``target``: logits, stride, maxima, stride, sums, stride; ``drafter``: with two strides.
    """
    cu_num_logits, idx_mapping, temperatures = batch
    at = torch.zeros(len(drafts), dtype=torch.int64)  # the token behind each row
    at[:-1] = drafts[1:].clamp(min=0)
    logits, _, maxima, _, sums, _ = target
    if not temperatures[idx_mapping].any():  # greedy: argmax decides
        empty = torch.empty(0)
        target_blocks = _blocks(maxima, sums, empty)
        return target_blocks, None if drafter[0] is None else target_blocks
    token_logits = logits.gather(1, at[:, None])[:, 0].float()
    target_blocks = _blocks(maxima, sums, token_logits)
    draft_logits, _, _, maxima, _, sums, _ = drafter
    if draft_logits is None:
        return target_blocks, None
    lengths = cu_num_logits.diff()
    reqs = idx_mapping.repeat_interleave(lengths).long()
    steps = torch.arange(len(drafts)) - cu_num_logits[:-1].repeat_interleave(lengths)
    steps = steps.clamp(max=draft_logits.shape[1] - 1)  # behind the last draft: not used
    at = at.clamp(max=draft_logits.shape[2] - 1)
    token_logits = draft_logits[reqs, steps, at].float() / temperatures[reqs]
    return target_blocks, _blocks(maxima, sums, token_logits)


def cumulative_log_p(*args: Any, **_constants: Any) -> None:
    """``_compute_cumulative_log_p_kernel``."""
    log_ps, target, drafts, drafter, batch = args[0], args[1:7], args[7], args[8:15], args[15:18]
    blocks = _verified([*target], [*drafter], drafts, [*batch])
    native.cumulative_log_p(*_arrays(log_ps, drafts, *batch), *blocks)


def residual_mass(
    *args: Any, BLOCK_SIZE: int, PADDED_VOCAB_NUM_BLOCKS: int, **_constants: Any
) -> None:
    """``_compute_local_residual_mass_kernel``: of max(p_i M_b - M_s, 0), by blocks of a row."""
    mass, _, log_ps, logits, _, *blocks = args[:9]
    draft_logits, _, _, *draft_blocks = args[9:16]
    drafts, idx_mapping, local_pos, temperatures, vocab_size, num_steps = args[16:22]
    is_used = (local_pos > 0) & (local_pos < num_steps) & (temperatures[idx_mapping] != 0)
    is_used[:-1] &= drafts[1:] >= 0
    is_used[-1] = False
    at = is_used.nonzero()[:, 0]
    if not len(at):
        return
    target_sums = _logsumexp(blocks[0][at], blocks[2][at])
    draft_sums = _logsumexp(draft_blocks[0][at], draft_blocks[2][at])
    p = (logits[at, :vocab_size].float() - target_sums).exp() * log_ps[at - 1, None].exp()
    rows = _drafter_s(draft_logits, idx_mapping[at], local_pos[at], temperatures)
    residual = (p - (rows[:, :vocab_size] - draft_sums).exp()).clamp(min=0)
    for n, block in enumerate(torch.split(residual, BLOCK_SIZE, dim=1)):
        mass[at, n] = block.sum(dim=1)


def _logsumexp(maxima: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    top = maxima.max(dim=1, keepdim=True).values
    return top + (sums * (maxima - top).exp()).sum(dim=1, keepdim=True).log()


def reject(*args: Any, **_constants: Any) -> None:
    """``_rejection_kernel``."""
    sampled, _, num_accepted, *rejected_sums = args[:5]
    logits, logits_stride, argmax, _, *target = args[5:13]
    drafts, drafter, batch = args[13], args[14:21], args[21:24]
    seeds, positions, rates, log_ps, mass = args[24:29]
    blocks = _verified([logits, logits_stride, *target], [*drafter], drafts, [*batch])
    native.reject(
        *_arrays(sampled, num_accepted, *rejected_sums, argmax, drafts, *batch, seeds, positions),
        *_arrays(rates, log_ps, mass),
        *blocks,
    )


STOCK: dict[str, Any] = {}  # vLLM's own kernels that a stand-in still launches


def keep_stock() -> None:
    """Before the stand-ins are registered."""
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

    STOCK[_RESAMPLE] = rejection_sampler_utils._resample_kernel


def resample(*args: Any, **constants: Any) -> None:
    """``_resample_kernel``: the token behind the accepted drafts, of what the drafter left."""
    if constants["WATERMARK"] or constants["USE_FP64"]:
        STOCK[_RESAMPLE][args[0].shape](*args, **constants)
    else:
        _resample(args, constants["BLOCK_SIZE"], constants["USE_BLOCK_VERIFICATION"])


def _resample(args: tuple[Any, ...], block_size: int, blockwise: bool) -> None:
    """As in ``gumbel_sample``, of a row's block maxima only the winner's is filled in."""
    local_argmax, _, local_max, _, logits, _, target_sums, draft_logits, _, _ = args[:10]
    draft_sums, num_accepted, cu_num_logits, idx_mapping, drafts = _arrays(*args[10:15])
    temperatures, seeds, positions, log_ps = _arrays(*args[15:19])
    vocab_size = args[25]
    flat, stride = flat_logits(logits), logits.stride(0)
    row, bounds = np.empty(vocab_size, np.float32), np.empty(native_sample.BLOCK, np.float32)
    local_max.fill_(-torch.inf)
    local_argmax.zero_()
    for i, accepted in enumerate(num_accepted.tolist()):
        logit = int(cu_num_logits[i]) + accepted
        req = idx_mapping[logit]
        is_bonus = logit == cu_num_logits[i + 1] - 1
        if temperatures[req] == 0 and not is_bonus:
            continue
        source = flat[logit * stride : logit * stride + vocab_size]
        if not is_bonus and drafts[logit + 1] >= 0:
            source = logits[logit, :vocab_size].float().numpy().copy()
            if draft_logits is None:
                source[drafts[logit + 1]] = -np.inf
            else:
                source -= target_sums.numpy()[i]
                if blockwise and accepted > 0:
                    source += log_ps[logit - 1]
                drafter_s = draft_logits[req, accepted, :vocab_size].float().numpy()
                source = _residual(source, drafter_s / temperatures[req] - draft_sums[i])
        token = native_sample.sample_noisy(
            *(source, temperatures[req], False, seeds[req], positions[logit], row, bounds)
        )
        local_max[i, token // block_size] = 0
        local_argmax[i, token // block_size] = token


def _residual(log_p: Array, log_q: Array) -> Array:
    """log(max(exp(log_p) - exp(log_q), 0))."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        ratio = np.exp(log_q - log_p)
        return np.where(ratio < 1, log_p + np.log1p(-ratio), np.float32(-np.inf))


def insert_resampled(*args: Any, **_constants: Any) -> None:
    """``_insert_resampled_kernel``."""
    native.insert_resampled(*_arrays(*args[:11]))


def prepare_standalone_prefill(*args: Any, **_constants: Any) -> None:
    """``_prepare_prefill_inputs_kernel`` of a draft model."""
    input_ids, positions, last_sampled, *others = args[:14]
    native.prepare_standalone_prefill(
        *_arrays(input_ids, positions, last_sampled.view(-1), *others)
    )


def prepare_head_prefill(*args: Any, **_constants: Any) -> None:
    """``_prepare_prefill_inputs_kernel`` of a head that takes the target's hidden states."""
    last_sampled, next_tokens = args[9].view(-1), args[10].view(-1)
    args[1].zero_()  # the draft's step
    native.prepare_head_prefill(
        *_arrays(args[0], *args[2:9], last_sampled, next_tokens, *args[11:16])
    )


def prepare_head_decode(*args: Any, ADVANCE_DRAFT_POSITIONS: bool, **_constants: Any) -> None:
    """``_prepare_decode_inputs_kernel``."""
    native.prepare_head_decode(*_arrays(*args[:11]), ADVANCE_DRAFT_POSITIONS)


def update_draft_inputs(*args: Any, ADVANCE_DRAFT_POSITIONS: bool, **_constants: Any) -> None:
    """``_update_draft_inputs_kernel``: a drafted token is kept, and the next step's input."""
    drafts, _, next_hidden_states, _, input_ids, positions, sample_positions, seq_lens = args[:8]
    draft_tokens, draft_step, hidden_states, _, hidden_size, max_model_len, num_steps = args[8:15]
    num_reqs, step = len(draft_tokens), int(draft_step)
    drafts[:num_reqs, step] = draft_tokens
    if step >= num_steps - 1:
        return
    next_hidden_states[:num_reqs, :hidden_size] = hidden_states[:num_reqs]
    native.advance_head(
        *_arrays(input_ids, positions, sample_positions, seq_lens, draft_tokens),
        *(max_model_len, ADVANCE_DRAFT_POSITIONS),
    )


_UTILS = "spec_decode.rejection_sampler_utils."
_RESAMPLE = _UTILS + "_resample_kernel"
_HEAD = "spec_decode.target_dependent_ar.speculator."
STAND_INS: dict[str, Callable[..., None]] = {  # behind "vllm.v1.worker.gpu."
    "input_batch._expand_idx_mapping_kernel": expand_idx_mapping,
    "spec_decode.rejection_sampler._gather_draft_sampled_kernel": gather_draft_sampled,
    "spec_decode.rejection_sampler._flatten_sampled_kernel": flatten_sampled,
    _UTILS + "_compute_local_logits_stats_kernel": logits_stats,
    _UTILS + "_compute_cumulative_log_p_kernel": cumulative_log_p,
    _UTILS + "_compute_local_residual_mass_kernel": residual_mass,
    _UTILS + "_rejection_kernel": reject,
    _RESAMPLE: resample,
    _UTILS + "_insert_resampled_kernel": insert_resampled,
    "spec_decode.standalone_ar.speculator._prepare_prefill_inputs_kernel": (
        prepare_standalone_prefill
    ),
    _HEAD + "_prepare_prefill_inputs_kernel": prepare_head_prefill,
    _HEAD + "_prepare_decode_inputs_kernel": prepare_head_decode,
    _HEAD + "_update_draft_inputs_kernel": update_draft_inputs,
}
