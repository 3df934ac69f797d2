"""Shapes of the models that ``gpu_check`` measures, as folders that vLLM reads; random weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedstep.errors import ConfigError

SEED = 0
TINY = "tiny"
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
# The public configurations, by name; what vLLM does not read of them is left out.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
    },
    "llama-3.2-1b": _LLAMA
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "rope_scaling": _LLAMA_3_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": _LLAMA
    | {
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "rope_scaling": _LLAMA_3_ROPE | {"factor": 8.0},
        "tie_word_embeddings": False,
    },
    TINY: _LLAMA
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 1024,
    },
}
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Model:
    """A folder for vLLM. ``dummy``: it holds no weights, the engine makes them up."""

    name: str
    path: Path
    config: dict[str, Any]
    dummy: bool

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token in all layers."""
        config = self.config
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        head_dim = config.get("head_dim")
        if head_dim is None:
            head_dim = config["hidden_size"] // config["num_attention_heads"]
        return int(2 * config["num_hidden_layers"] * heads * head_dim * _DTYPE_BYTES[dtype])


def load(name: str, folder: Path) -> Model:
    """A name of SHAPES, written into ``folder``, or the folder ``name`` with its ``config.json``.

    Raises:
        ConfigError: there is no such model.
    """
    if name in SHAPES:
        path, config = folder / name, SHAPES[name]
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2))
        if name == TINY:  # the CPU's layers pack their weights when they are loaded
            _write_weights(path, config)
        return Model(name, path, config, dummy=name != TINY)
    path = Path(name).expanduser()
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        raise ConfigError(
            f"no model {name}: use {', '.join(SHAPES)} or a folder with a config.json"
        ) from None
    missing = [key for key in ("vocab_size", "num_hidden_layers") if key not in config]
    if missing:
        raise ConfigError(f"the config.json of {name} has no {missing[0]}")
    return Model(path.name, path, config, dummy=not any(path.glob("*.safetensors")))


def _write_weights(path: Path, config: dict[str, Any]) -> None:
    """Random Llama weights, the same everywhere; norms are 1, logits as wide as a real model's."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(SEED)

    def normal(rows: int, columns: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * std / math.sqrt(columns)

    hidden, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    weights = {
        "model.embed_tokens.weight": normal(vocab, hidden),
        "lm_head.weight": normal(vocab, hidden, std=3.0),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.self_attn.q_proj.weight": normal(width, hidden),
            f"{prefix}.self_attn.k_proj.weight": normal(kv_width, hidden),
            f"{prefix}.self_attn.v_proj.weight": normal(kv_width, hidden),
            f"{prefix}.self_attn.o_proj.weight": normal(hidden, width),
            f"{prefix}.mlp.gate_proj.weight": normal(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": normal(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": normal(hidden, inner),
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
        }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
