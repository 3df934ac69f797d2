"""A target and a draft model of random weights, so small that a round is nearly all framework.

``python -m fusedstep.bench.pair FOLDER`` writes FOLDER/target, of 4 layers, and FOLDER/draft: its
first layer, its embedding and its head. What the target's other layers add to its hidden state is
so little that about 70 % of 3 drafts hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

NUM_LAYERS = 4
SCALE = 0.05  # of what the layers behind the first add: the share of drafts that hold follows
CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,  # of 32: vLLM's CPU attention knows no less
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,  # tied, a random model repeats itself, and every draft holds
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def make(folder: Path) -> None:
    """Write both models."""
    import torch

    torch.manual_seed(1)
    target, draft = _llama(NUM_LAYERS), _llama(1)
    draft.load_state_dict(target.state_dict(), strict=False)
    with torch.no_grad():
        for layer in target.model.layers[1:]:
            layer.self_attn.o_proj.weight *= SCALE
            layer.mlp.down_proj.weight *= SCALE
    target.save_pretrained(folder / "target")
    draft.save_pretrained(folder / "draft")


def _llama(num_layers: int) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=num_layers, **CONFIG)
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Write the models to FOLDER/target and FOLDER/draft."""
    make(folder)


if __name__ == "__main__":
    main()
