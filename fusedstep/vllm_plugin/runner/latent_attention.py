"""Latent attention (MLA): what it was not tried with in windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from fusedstep.reasons import Reason

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

# Of vLLM's backend CPU_MLA; its backends for other devices have builders of other names.
BUILDER = "MLACommonMetadataBuilder"


def latent_reason(runner: GPUModelRunner) -> str | None:
    """The reason that a model of latent attention takes stock steps, or None."""
    config = runner.vllm_config
    others = (
        (runner.device.type != "cpu", "on a device that is not a CPU"),
        (config.parallel_config.tensor_parallel_size > 1, "with tensor parallelism"),
        (config.parallel_config.data_parallel_size > 1, "with data parallelism"),
        (config.speculative_config is not None, "with drafts"),
        (config.kv_transfer_config is not None, "with a KV connector"),
        (config.lora_config is not None, "with LoRA"),
        (_rotates_by_row(runner), "rotated by vLLM's kernel for CPUs"),
    )
    return next((f"{Reason.LATENT} {words}" for applies, words in others if applies), None)


def _rotates_by_row(runner: GPUModelRunner) -> bool:
    """Does vLLM's kernel for CPUs rotate queries and keys?

    Of [tokens, heads, size] it takes each head for a token: how a token is rotated follows from its
    row in the batch, and batches of windows are not always those of stock.
    """
    rotations = (each for each in runner.model.modules() if isinstance(each, RotaryEmbedding))
    methods = (getattr(each._forward_method, "__func__", None) for each in rotations)
    return RotaryEmbedding.forward_cpu in methods
