"""``--rope fused`` in real vLLM, interpreted: tokens equal to stock's, and not with a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import features_child
import pytest
import rotation_child
import tiny_models
import torch
from engine_child import EngineChild
from features_child import Ask, FeatureChild
from vllm.config import CompilationMode

from fusedstep.vllm_plugin import rotation

OPTIONS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,  # a prompt in two steps, beside decodes
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 23,
}
OURS = OPTIONS | {"attention_backend": "FUSEDSTEP", "rope": "fused"}
GREEDY = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
SEEDED = {"max_tokens": 6, "temperature": 1.0, "seed": 5, "ignore_eos": True}
ASKS = [
    Ask({"prompt_token_ids": list(range(20, 20 + length))}, fields, at=at)
    for length, fields, at in (
        (1, GREEDY, 0),
        (60, SEEDED, 0),
        (5, GREEDY, 1),
        (33, SEEDED, 2),
        (3, GREEDY, 2),
    )
]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[EngineChild]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("FUSEDSTEP_OPS", "triton")
        child = FeatureChild("on")
        child.call(features_child.ready)
    yield child
    child.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder, made = tmp_path_factory.mktemp("models"), dict[str, str]()

    def model(name: str) -> str:
        if name not in made:
            made[name] = tiny_models.make(name, folder / name)
        return made[name]

    return model


def tokens(answers: list[Any]) -> list[list[int]]:
    return [list(answer["token_ids"]) for (answer,) in answers]


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("llama", ["decodes a position too far"]),
        ("qwen2", []),
        ("qwen3", list(rotation_child.FAULTS)),
    ],
    ids=str,
)
def test_tokens_equal_stock_vllm(
    oracle: EngineChild,
    interpreted: EngineChild,
    models: Callable[[str], str],
    name: str,
    faults: list[str],
) -> None:
    """Greedy and seeded; prefills in pieces beside decodes, windows, more requests than rows."""
    model = models(name)
    want = tokens(oracle.call(rotation_child.ask, model, OPTIONS, ASKS))
    have = tokens(interpreted.call(rotation_child.ask, model, OURS, ASKS))
    assert interpreted.call(rotation_child.layers) == {"fused": 2}
    assert have == want and {len(answer) for answer in have} == {6}
    assert interpreted.call(rotation_child.parameters) == oracle.call(rotation_child.parameters)
    for fault in faults:
        wrong = tokens(interpreted.call(rotation_child.ask, model, OURS, ASKS[:2], fault))
        assert wrong != want[:2], fault


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("llama", {"rope": "stock"}, {}),
        ("llama", {"attention_backend": None}, {}),
        ("gemma3", {}, {"not of Gemma3Attention": 2}),
    ],
    ids=str,
)
def test_what_is_not_known_stays_vllms(
    interpreted: EngineChild,
    oracle: EngineChild,
    models: Callable[[str], str],
    name: str,
    options: dict[str, Any],
    layers: dict[str, int],
) -> None:
    model = models(name)
    have = tokens(interpreted.call(rotation_child.ask, model, OURS | options, ASKS[:2]))
    assert interpreted.call(rotation_child.layers) == layers
    assert have == tokens(oracle.call(rotation_child.ask, model, OPTIONS, ASKS[:2]))


JOINED = {"mode": CompilationMode.VLLM_COMPILE, "backend": "inductor"}
APART = {"mode": CompilationMode.NONE, "backend": "inductor"}


@pytest.mark.parametrize(
    ("compilation", "is_native", "norm", "dtype", "rounded"),
    [
        (JOINED, True, "native", torch.bfloat16, False),  # one kernel of Inductor's
        (APART, False, "vllm_c", torch.bfloat16, True),  # kernels of vLLM's
        (APART, False, "native", torch.float16, True),
        (JOINED, True, "vllm_c", torch.bfloat16, True),
        (JOINED, False, "native", torch.bfloat16, None),  # rounded once, between two kernels
        (JOINED, False, None, torch.bfloat16, False),  # no norm
        (APART, False, None, torch.bfloat16, False),
        (APART, True, None, torch.bfloat16, None),  # each product is rounded
        (APART, True, "native", torch.bfloat16, None),
        (JOINED, True, "oink", torch.bfloat16, None),
        (APART, True, "oink", torch.float32, False),  # nothing to round
    ],
    ids=str,
)
def test_rounding_is_that_of_what_stock_runs(
    compilation: dict[str, Any],
    is_native: bool,
    norm: str | None,
    dtype: torch.dtype,
    rounded: bool | None,
) -> None:
    embedding = SimpleNamespace(forward_native=1, _forward_method=1 if is_native else 2)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(**compilation),
        model_config=SimpleNamespace(dtype=dtype),
        kernel_config=SimpleNamespace(ir_op_priority=SimpleNamespace(rms_norm=[norm])),
    )
    assert rotation._rounded(embedding, norm is not None, config) is rounded


def test_a_shared_embedding_stays_the_others() -> None:
    """Of two modules with one embedding only the one that is known hands on; nobody else's rope
    changes, and its tables stay among the model's buffers."""
    shared = torch.nn.Module()
    shared.register_buffer("cos_sin_cache", torch.zeros(4, 8), persistent=False)
    module, other = torch.nn.Module(), torch.nn.Module()
    module.rotary_emb = other.rotary_emb = shared
    module.attn = SimpleNamespace(impl=SimpleNamespace())
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    config.compilation_config = SimpleNamespace(**APART)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rotation.ATTENTION, "torch.nn.modules.module.Module", False)
        rotation._hand_over(module, config)
    query, key = torch.ones(2, 8), torch.ones(2, 8)
    assert module.rotary_emb(None, query, key) == (query, key)
    assert other.rotary_emb is shared and module.attn.impl.handed_over.embedding is shared
    assert [name for name, _ in module.named_buffers()] == ["rotary_emb.stock.cos_sin_cache"]


class Heads(torch.nn.Module):
    """Qwen3Attention from its projection to its attention."""

    def __init__(self) -> None:
        from vllm.model_executor.layers.layernorm import RMSNorm
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

        super().__init__()
        self.q_norm, self.k_norm = RMSNorm(32), RMSNorm(32)
        self.rotary_emb = RotaryEmbedding(32, 32, 64, 1e4, True, torch.float32)
        self.attn = SimpleNamespace(impl=SimpleNamespace())

    def forward(
        self, positions: torch.Tensor, qkv: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = qkv.split([64, 32], dim=-1)
        q = self.q_norm(q.view(-1, 2, 32)).view(q.shape)
        k = self.k_norm(k.view(-1, 1, 32)).view(k.shape)
        return self.rotary_emb(positions, q, k)


@pytest.mark.parametrize("is_fused", [False, True])
def test_what_is_handed_over_is_not_compiled(is_fused: bool) -> None:
    """Dynamo finds one graph; norm and rotation are in it, or views alone."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    with set_current_vllm_config(config), pytest.MonkeyPatch.context() as patch:
        module = Heads()
        for op in (module.q_norm, module.k_norm, module.rotary_emb):
            op._forward_method = op.forward_native
        if is_fused:
            patch.setitem(rotation.ATTENTION, rotation._name(module), True)
            patch.setattr(rotation, "_rounded", lambda *_: False)
            rotation._hand_over(module, config)
        positions, qkv = torch.arange(5), torch.randn(5, 96)
        query, key = torch.compile(module, backend=keep, fullgraph=True)(positions, qkv)
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes if node.op.startswith("call")}
    views = ("view", "split", "getitem")
    computed = {name for name in called if not any(view in name for view in views)}
    if is_fused:
        assert not computed
    else:
        assert {"vllm_ir.rms_norm.default", "index_select"} <= computed
    assert torch.equal(torch.cat([query, key], dim=1), qkv) is is_fused
