"""What a model brings along: known parts decode in windows, all others by name in stock steps."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scheduler.trace import Spec, Trace
from scheduler.world import STOCK, make_scheduler
from vllm._custom_ops import rotary_embedding
from vllm.config import KVTransferConfig
from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder
from vllm.v1.attention.backends.flex_attention import (
    FlexAttentionBackend,
    FlexAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder
from vllm.v1.attention.backends.linear_attn import LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.mamba1_attn import Mamba1AttentionMetadataBuilder
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionMetadataBuilder
from vllm.v1.attention.backends.mla.amx_mla import AMXMLABackend
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend
from vllm.v1.attention.backends.short_conv_attn import (
    PleShortConvAttentionMetadataBuilder,
    ShortConvAttentionMetadataBuilder,
)
from vllm.v1.core.single_type_kv_cache_manager import CrossAttentionManager
from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
)
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from fusedstep.vllm_plugin import reasons
from fusedstep.vllm_plugin.runner.parts import metadata_reason, runner_reason
from fusedstep.vllm_plugin.scheduler.blocks import Blocks

KEYS = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
STATE = MambaSpec(block_size=16, shapes=((2, 3),), dtypes=(torch.float32,))


class SomebodysBuilder:
    """A plug-in's, of a name that vLLM has, too."""


SomebodysBuilder.__name__ = "Mamba2AttentionMetadataBuilder"


def reason(*layers: tuple[Any, type], runner: Any = None) -> str | None:
    """Of a model whose layers have these KV caches and builders."""
    runner = runner or SimpleNamespace()
    groups = [
        SimpleNamespace(
            kv_cache_spec=spec,
            get_metadata_builder=lambda _, builder=builder: object.__new__(builder),
        )
        for spec, builder in layers
    ]
    runner.attn_groups = [groups]
    return metadata_reason(runner)


@pytest.mark.parametrize(
    "builder",
    [
        Mamba2AttentionMetadataBuilder,
        GDNAttentionMetadataBuilder,
        ShortConvAttentionMetadataBuilder,
    ],
)
def test_known_builders(builder: type) -> None:
    assert reason((KEYS, CPUAttentionMetadataBuilder), (STATE, builder)) is None


@pytest.mark.parametrize(
    ("spec", "builder"),
    [
        (KEYS, FlexAttentionMetadataBuilder),
        (STATE, Mamba1AttentionMetadataBuilder),
        (STATE, LinearAttentionMetadataBuilder),
        (STATE, PleShortConvAttentionMetadataBuilder),
        (STATE, SomebodysBuilder),
        (STATE, CPUAttentionMetadataBuilder),  # not of states
    ],
)
def test_unknown_builders(spec: Any, builder: type) -> None:
    known = KEYS, CPUAttentionMetadataBuilder
    assert reason(known, (spec, builder)) == f"attention metadata of {builder.__name__}"


def test_cross_attention_is_known_by_what_it_is_made_from() -> None:
    across = CrossAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    known, unknown = (
        create_cross_attention_backend(backend).get_builder_cls()
        for backend in (CPUAttentionBackend, FlexAttentionBackend)
    )
    keys = KEYS, CPUAttentionMetadataBuilder
    assert reason(keys, (across, known)) is None
    assert reason(keys, (across, unknown)) == "attention metadata of FlexAttentionMetadataBuilder"


LATENT = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32)


def latent(**other: Any) -> str | None:
    """Of a model of latent attention on a CPU, where nothing else is special."""
    usual = {
        "device": torch.device("cpu"),
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "speculative_config": None,
        "kv_transfer_config": None,
        "lora_config": None,
        "model": torch.nn.Module(),
    }
    parts = SimpleNamespace(**usual | other)
    parts.parallel_config = parts.vllm_config = parts
    return reason((LATENT, CPUMLABackend.get_builder_cls()), runner=parts)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"device": torch.device("cuda")}, "on a device that is not a CPU"),
        ({"tensor_parallel_size": 2}, "with tensor parallelism"),
        ({"data_parallel_size": 2}, "with data parallelism"),
        ({"speculative_config": object()}, "with drafts"),
        ({"kv_transfer_config": object()}, "with a KV connector"),
        ({"lora_config": object()}, "with LoRA"),
    ],
)
def test_what_latent_attention_was_not_tried_with(other: dict[str, Any], words: str) -> None:
    assert latent() is None
    assert latent(**other) == f"latent attention {words}"


@pytest.mark.parametrize("backend", [AMXMLABackend, TritonMLABackend])
def test_other_backends_of_latent_attention_have_builders_of_their_own(backend: Any) -> None:
    builder = backend.get_builder_cls()
    assert reason((LATENT, builder)) == f"attention metadata of {builder.__name__}"


def test_vllms_kernel_for_cpus_rotates_heads_as_if_they_were_tokens() -> None:
    """Where this fails, vLLM has repaired it: windows may then have such models, too."""
    positions, size = torch.tensor([5, 6, 7]), 64
    table, queries, keys = torch.randn(16, size), torch.randn(3, 2, size), torch.randn(3, 1, size)
    want, _ = RotaryEmbedding.forward_static(positions, queries, keys, size, size, table, False)
    rotary_embedding(positions, queries, keys, size, table, False)
    assert torch.allclose(queries[0, 0], want[0, 0], atol=1e-5)
    assert not torch.allclose(queries[0, 1], want[0, 1], atol=1e-5)


def test_an_encoder_decoder_model_on_another_device() -> None:
    config = make_scheduler(Trace((Spec((1,), 0, 1),)), STOCK[True]).vllm_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        patch.setitem(vars(config.model_config), "is_encoder_decoder", True)  # cached
        assert reasons.engine_reason(config) is None
        patch.setattr(config.device_config, "device_type", "cuda")
        assert reasons.engine_reason(config) == (
            "encoder-decoder model on a device that is not a CPU"
        )


DRAFTS = SimpleNamespace(
    method="ngram",
    num_speculative_tokens=3,
    parallel_drafting=False,
    enable_adaptive_verification=False,
    uses_dynamic_speculative_decoding=lambda: False,
)
RECEIVES = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_consumer")
NOT_WITH_EXPERTS: tuple[tuple[str | None, str, Any, str], ...] = (
    (None, "speculative_config", DRAFTS, "with drafts"),
    (None, "kv_transfer_config", RECEIVES, "with a KV connector"),
    ("parallel_config", "data_parallel_size", 2, "with data parallelism"),
    ("parallel_config", "tensor_parallel_size", 2, "with tensor parallelism"),
    ("aux_output_config", "enable_return_hidden_states", True, ""),  # a newer vLLM's
)


@pytest.mark.parametrize(("holder", "name", "value", "words"), NOT_WITH_EXPERTS)
def test_what_routed_experts_were_not_tried_with(
    holder: str | None, name: str, value: Any, words: str
) -> None:
    """Nothing else keeps this engine from windows: without the experts it has them."""
    config = make_scheduler(Trace((Spec((1,), 0, 1),)), STOCK[True]).vllm_config
    outputs = config.aux_output_config
    owner = config if holder is None else getattr(config, holder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        patch.setattr(outputs, "enable_return_routed_experts", True)
        assert reasons.engine_reason(config) is None
        patch.setitem(vars(owner), name, value)
        assert reasons.engine_reason(config) == f"auxiliary outputs {words}".rstrip()
        patch.setattr(outputs, "enable_return_routed_experts", False)
        assert reasons.engine_reason(config) is None


def test_blocks_of_an_encoders_keys_are_not_held_ahead() -> None:
    """A request has them from its prefill on: as many as its encoder has tokens."""
    across = object.__new__(CrossAttentionManager)
    across.block_size, across.req_to_blocks = 16, {"a": [None] * 30}
    keys = SimpleNamespace(block_size=16, req_to_blocks={"a": [None] * 2})
    coordinator = SimpleNamespace(single_type_managers=(keys, across))
    blocks = Blocks(SimpleNamespace(coordinator=coordinator), 512)
    request: Any = SimpleNamespace(
        request_id="a", num_tokens=20, spec_token_ids=[], num_output_placeholders=1
    )
    assert blocks.held_ahead([request]) == 0
    assert blocks.most_tokens_ahead([request]) <= 0
    assert blocks.at_most(16) == 1


def test_ways_to_cache_states() -> None:
    def reason(spec: Any) -> str | None:
        return reasons.cache_reason(
            SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
        )

    for mode in ("none", "align"):
        assert reason(replace(STATE, mamba_cache_mode=mode)) is None
    assert reason(replace(STATE, mamba_cache_mode="all")) == "recurrent state cached as all"


def test_a_subclass_of_a_model_state_is_not_known() -> None:
    class Another(MambaHybridModelState):  # type: ignore[misc]
        pass

    runner = SimpleNamespace(model_state=object.__new__(Another), sampler=None)
    assert runner_reason(runner) == "model state Another"


@pytest.mark.parametrize(
    ("part", "option", "words"),
    [
        ("cache_config", "use_replayssm", "ReplaySSM"),
        ("mamba_config", "enable_stochastic_rounding", "randomly rounded recurrent state"),
    ],
)
def test_options_of_states(part: str, option: str, words: str) -> None:
    trace = Trace((Spec((1,), 0, 1),)).with_states(checkpoints=False)
    config = make_scheduler(trace, STOCK[True]).vllm_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        assert reasons.engine_reason(config) is None
        patch.setattr(getattr(config, part), option, True)
        assert reasons.engine_reason(config) == words
