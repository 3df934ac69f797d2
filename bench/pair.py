"""Models of random weights, so small that a step is nearly all framework.

``python -m fusedstep.bench.pair FOLDER`` writes FOLDER/target, of 4 layers, and FOLDER/draft: its
first layer, its embedding and its head. What the target's other layers add to its hidden state is
so little that about 70 % of 3 drafts hold. FOLDER/alone, of 2 layers, drafts for nobody. Their
tokenizer knows every byte, so that any JSON can be written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from fusedstep.demo import byte_level_bpe

NUM_LAYERS = 4
SCALE = 0.05  # of what the layers behind the first add: the share of drafts that hold follows
STD = 0.2  # of all weights
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float32",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,  # of 32: vLLM's CPU attention knows no less
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,  # tied, a random model repeats itself, and every draft holds
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def make(folder: Path) -> None:
    """Write both models."""
    torch.manual_seed(1)
    tensors = {name: _random(name, shape) for name, shape in _shapes(NUM_LAYERS).items()}
    _write(folder / "target", NUM_LAYERS, tensors)
    _write(folder / "draft", 1, {name: tensors[name] for name in _shapes(1)})
    _write(folder / "alone", 2, {name: tensors[name] for name in _shapes(2)})


def _shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Of a Llama's weights."""
    size, inner, vocab_size = (
        CONFIG[k] for k in ("hidden_size", "intermediate_size", "vocab_size")
    )
    keys = size * CONFIG["num_key_value_heads"] // CONFIG["num_attention_heads"]
    of_layer = {
        "input_layernorm": (size,),
        "post_attention_layernorm": (size,),
        "self_attn.q_proj": (size, size),
        "self_attn.k_proj": (keys, size),
        "self_attn.v_proj": (keys, size),
        "self_attn.o_proj": (size, size),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }
    of_model = {
        "model.embed_tokens": (vocab_size, size),
        "model.norm": (size,),
        "lm_head": (vocab_size, size),
    } | {
        f"model.layers.{n}.{name}": shape
        for n in range(num_layers)
        for name, shape in of_layer.items()
    }
    return {f"{name}.weight": shape for name, shape in of_model.items()}


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    adds = name.endswith(("o_proj.weight", "down_proj.weight"))
    is_first = name.startswith("model.layers.0.")
    return torch.randn(shape) * STD * (SCALE if adds and not is_first else 1.0)


def _write(folder: Path, num_layers: int, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"num_hidden_layers": num_layers}
    _write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "tokenizer.json", byte_level_bpe(_tokens(), (1, 2), merges=[]))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    of_class = {"tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(folder / "tokenizer_config.json", of_class | named)


def _tokens() -> list[str]:
    """The 256 bytes, as GPT-2 writes them, and words that only a model says."""
    written = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(n) for n in (*written, *range(0x100, 0x100 + 256 - len(written)))]
    tokens = ["<unk>", "<s>", "</s>", *characters]
    return tokens + [f"word{n}" for n in range(len(tokens), CONFIG["vocab_size"])]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Write the models to FOLDER/target, FOLDER/draft and FOLDER/alone."""
    make(folder)


if __name__ == "__main__":
    main()
