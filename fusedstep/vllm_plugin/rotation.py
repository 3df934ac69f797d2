"""``--rope fused``: models of known classes leave QK-norm and rotary embedding to our attention.

After the model is loaded its attention modules get a rotary embedding, and norms, that hand on what
they are given; ``FusedStepAttentionImpl`` does the rest, in its launch. Shared rotary embeddings
and all parameters stay where they are. What is not known stays as it is, and the log says why.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode

from fusedstep.ops.rotation import MAX_HEAD_SIZE, Rotation
from fusedstep.vllm_plugin.compat import BACKEND

logger = logging.getLogger("vllm.fusedstep")
# Their forward: projection, norms of heads (if they have them), rotary embedding, attention.
ATTENTION = {
    "vllm.model_executor.models.llama.LlamaAttention": False,
    "vllm.model_executor.models.qwen2.Qwen2Attention": False,
    "vllm.model_executor.models.qwen3.Qwen3Attention": True,  # has norms
}
# A table of cosines and sines of positions, and nothing else.
EMBEDDINGS = {
    "vllm.model_executor.layers.rotary_embedding.base.RotaryEmbedding",
    "vllm.model_executor.layers.rotary_embedding.llama3_rope.Llama3RotaryEmbedding",
}
NORM = "vllm.model_executor.layers.layernorm.RMSNorm"
FORM = "fusedstep_rope"  # in additional_config: the cache of compiled models is keyed by it


class HandOn(nn.Module):
    """In the place of a rotary embedding: queries and keys as they came."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock  # its buffers stay the model's: sleep mode saves them

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return query, key


def hand_on(states: torch.Tensor) -> torch.Tensor:
    """In the place of a norm's own forward method."""
    return states


@dataclass(frozen=True)
class HandedOver:
    """Norms and rotary embedding that one attention layer does itself.

    Tensors are looked up each time: new weights may be other tensors.
    """

    embedding: Any
    query_norm: Any  # a module, or None
    key_norm: Any
    rounded: bool

    def rotation(self) -> Rotation:
        """As our kernels take it."""
        if self.query_norm is None:
            return Rotation(self.embedding.cos_sin_cache)
        return Rotation(
            self.embedding.cos_sin_cache,
            self.query_norm.weight,
            self.key_norm.weight,
            self.query_norm.variance_epsilon,
            self.rounded,
        )


def hand_over(model: nn.Module, vllm_config: Any) -> Counter[str]:
    """Hand over what can be; layers by what became of them, "fused" or a reason."""
    found: Counter[str] = Counter()
    for module in list(_attentions(model)):
        reason = _obstacle(module, vllm_config)
        found[reason or "fused"] += 1
        if reason is None:
            _hand_over(module, vllm_config)
    if found["fused"]:
        vllm_config.additional_config[FORM] = "fused"
    for words, number in sorted((+found).items()) or [("no attention layer of ours", 0)]:
        logger.info("fusedstep: rotary embedding in attention: %s (%d layers)", words, number)
    return +found


def _attentions(model: nn.Module) -> Iterator[nn.Module]:
    """Modules around an attention layer of our backend."""
    for module in model.modules():
        backend = getattr(getattr(module, "attn", None), "attn_backend", None)
        if backend is not None and backend.get_name() == BACKEND:
            yield module


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _obstacle(module: Any, vllm_config: Any) -> str | None:
    """The reason that this module keeps its rotary embedding, or None."""
    has_norms = ATTENTION.get(_name(module))
    if has_norms is None:
        return f"not of {type(module).__name__}"
    embedding, attention = module.rotary_emb, module.attn
    if _name(embedding) not in EMBEDDINGS or not embedding.is_neox_style:
        return f"not a {type(embedding).__name__}"
    if not has_norms and getattr(module, "qk_norm", False):
        return f"not norms of {type(module).__name__}"
    norms = [module.q_norm, module.k_norm] if has_norms else []
    if any(_name(n) != NORM or n.variance_size_override or not n.has_weight for n in norms):
        return "not such a norm"
    if len({n.variance_epsilon for n in norms}) > 1:
        return "not two epsilons"
    if not attention.impl.can_decode:
        return "this layer's attention is vLLM's"
    size = attention.head_size
    if size > MAX_HEAD_SIZE or attention.head_size_v != size or embedding.head_size != size:
        return f"not heads of {size}"
    table, dtype = embedding.cos_sin_cache, vllm_config.model_config.dtype
    if table.dtype != dtype or table.shape[1] != embedding.rotary_dim or table.stride(1) != 1:
        return f"not a table of {table.dtype}"
    if any(n.weight.dtype != dtype for n in norms):
        return "not norms of another dtype"
    if _rounded(embedding, bool(norms), vllm_config) is None:
        return "vLLM rounds in a way of its own"
    return None


def _rounded(embedding: Any, has_norms: bool, vllm_config: Any) -> bool | None:
    """Does stock round a normed head before it rotates it, twice? None: it is not known.

    The CUDA kernel of the rotation rounds once, as Inductor's code does. Where that comes after a
    norm that Inductor has, too, both are one kernel, which rounds nothing in between.
    """
    compilation = vllm_config.compilation_config
    if vllm_config.model_config.dtype == torch.float32:
        return False
    is_inductor = compilation.mode != CompilationMode.NONE and compilation.backend == "inductor"
    is_native = embedding._forward_method == embedding.forward_native
    if is_native and not is_inductor:
        return None  # each product and sum is rounded
    if not has_norms:
        return False
    norm = (vllm_config.kernel_config.ir_op_priority.rms_norm or ["native"])[0]
    if norm not in ("native", "vllm_c"):
        return None
    if norm == "vllm_c" or not is_inductor:
        return True
    return False if is_native else None  # rounded once, between two kernels


def _hand_over(module: Any, vllm_config: Any) -> None:
    embedding = module.rotary_emb
    has_norms = ATTENTION[_name(module)]
    module.attn.impl.handed_over = HandedOver(
        embedding,
        module.q_norm if has_norms else None,
        module.k_norm if has_norms else None,
        bool(_rounded(embedding, has_norms, vllm_config)),
    )
    module.rotary_emb = HandOn(embedding)  # the module's own: other layers share the embedding
    if has_norms:
        module.q_norm._forward_method = module.k_norm._forward_method = hand_on
