"""The attention backend FUSEDSTEP: our kernel where rows have few new tokens, else vLLM's Triton.

A batch whose rows have up to ``MAX_QUERY_LEN`` new tokens each (a decode step, a verification) is
one launch, which also writes the step's keys and values: ``fusedstep.ops.attention``. Prefills and
batches with one take vLLM's cache update and its unified attention, as TRITON_ATTN does; so do the
layers that our kernel is not made for (``FusedStepAttentionImpl``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from fusedstep.ops.attention import DTYPES, MAX_QUERY_LEN, AttentionLayer, DecodeAttention
from fusedstep.ops.rotation import rotate
from fusedstep.vllm_plugin.compat import BACKEND

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from fusedstep.vllm_plugin.rotation import HandedOver


@dataclass
class FusedStepAttentionMetadata(TritonAttentionMetadata):  # type: ignore[misc]
    """TRITON_ATTN's, and how the batch decodes."""

    query_len: int = 0  # new tokens of a row at most; 0: the batch is vLLM's
    decode: DecodeAttention | None = None


class FusedStepAttentionMetadataBuilder(TritonAttentionMetadataBuilder):  # type: ignore[misc]
    """Says which batches decode. A decode step's metadata is made of static buffers: the next
    step's needs no update, and a CUDA graph of any batch can be replayed."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        sizes = vllm_config.compilation_config.cudagraph_capture_sizes or []
        self._max_num_rows = max(vllm_config.scheduler_config.max_num_seqs, *sizes, 1)
        self._decode = DecodeAttention(
            [layers[name].impl.decode_layer() for name in layer_names],
            self._max_num_rows,
            torch.device(device),
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FusedStepAttentionMetadata:
        """TRITON_ATTN's metadata, and ``query_len`` where each row has few new tokens."""
        common = common_attn_metadata
        stock: TritonAttentionMetadata = super().build(common_prefix_len, common, fast_build)
        decodes = (
            1 <= common.max_query_len <= MAX_QUERY_LEN
            and common.num_reqs <= self._max_num_rows
            # Of one token each, row i's is token i.
            and (common.max_query_len > 1 or common.num_actual_tokens == common.num_reqs)
            and common.causal is True
            and stock.mm_prefix_range_tensor is None
            and stock.rswa_prefix_lens is None
        )
        query_len = common.max_query_len if decodes else 0
        return FusedStepAttentionMetadata(**vars(stock), query_len=query_len, decode=self._decode)


class FusedStepAttentionImpl(TritonAttentionImpl):  # type: ignore[misc]
    """One layer. Always vLLM's kernels: per-token-head quantised caches, layers that read the cache
    of another one, square-root ALiBi, chunked attention with lookback."""

    handed_over: HandedOver | None = None  # queries and keys come neither normed nor rotated

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Our kernel takes the query as it is, also with an fp8 cache.
        self.supports_quant_query_input = False
        self.can_decode = (
            not self._is_per_token_head_quant
            and self.kv_sharing_target_layer_name is None
            and not self.use_alibi_sqrt
            and self.chunk_lookback < 0
        )
        self._is_fp8 = self.kv_cache_dtype.startswith("fp8") and not self._is_per_token_head_quant

    def decode_layer(self, layer: Any = None) -> AttentionLayer:
        """This layer as our kernel takes it; the scales of an fp8 cache are ``layer``'s."""
        has_scales = self._is_fp8 and layer is not None
        return AttentionLayer(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            scale=self.scale,
            window=self.sliding_window[0] + 1,
            soft_cap=self.logits_soft_cap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            k_scale=layer._k_scale if has_scales else None,
            v_scale=layer._v_scale if has_scales else None,
            rotation=None if self.handed_over is None else self.handed_over.rotation(),
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        attn_metadata: FusedStepAttentionMetadata | None,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the new keys and values to the cache and the attention to ``output``."""
        if attn_metadata is None:  # vLLM measures its memory
            return output.fill_(0)
        metadata = attn_metadata
        if self.can_decode and metadata.query_len and query.dtype in DTYPES:
            assert metadata.decode is not None
            cache = kv_cache.view(self.fp8_dtype) if self._is_fp8 else kv_cache
            metadata.decode(
                self.decode_layer(layer),
                query,
                key,
                value,
                cache,
                output,
                metadata.block_table,
                metadata.seq_lens,
                metadata.slot_mapping,
                metadata.query_start_loc,
                metadata.query_len,
            )
            return output
        if self.handed_over is not None:
            query, key = rotate(
                self.handed_over.rotation(),
                query,
                key,
                metadata.seq_lens,
                metadata.query_start_loc,
            )
        if self.kv_sharing_target_layer_name is None and key is not None:
            self.do_kv_cache_update(layer, key, value, kv_cache, metadata.slot_mapping)
        attended: torch.Tensor = super().forward(
            layer,
            query,
            key,
            value,
            kv_cache,
            metadata,
            output,
            output_scale,
            output_block_scale,
        )
        return attended

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """vLLM's kernel; on the CPU plain torch, as that kernel asks CUDA for its device."""
        if kv_cache.device.type != "cpu":
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        (token,) = (slot_mapping >= 0).nonzero(as_tuple=True)
        slots, block_size = slot_mapping[token], kv_cache.shape[2]
        states = torch.cat([key[token], value[token]], dim=-1).to(kv_cache.dtype)
        kv_cache[slots // block_size, :, slots % block_size] = states

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Our kernel writes the model's dtype."""
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        """The cache is written by the attention itself."""
        return False


class FusedStepAttentionBackend(TritonAttentionBackend):  # type: ignore[misc]
    """Decoder attention. Not supported, in vLLM's words: MLA, encoders, cross attention, DCP, PCP,
    batch invariance (where a row is split depends on the others)."""

    forward_includes_kv_cache_update: bool = True
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        name for name in TritonAttentionBackend.supported_kv_cache_dtypes if name != "fp8_e5m2"
    ]

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[FusedStepAttentionImpl]:
        return FusedStepAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FusedStepAttentionMetadataBuilder]:
        return FusedStepAttentionMetadataBuilder

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder self-attention only."""
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False
