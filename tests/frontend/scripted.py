"""A tiny model that says what it is told: its next token is a function of the position alone.

Position embeddings are unit vectors, everything between them and the head adds nothing, and the
head's row of a token has a one at each position after which the token comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from frontend.stream import tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

POSITIONS = 256
TEMPLATE = "{{ messages[-1]['content'] }}"


def prompt(length: int) -> str:
    """A text of so many tokens, in a chat too: what the model says begins behind it."""
    return " a" * length


def make(folder: Path, scripts: Mapping[int, Sequence[int]]) -> None:
    """Save a model that says ``scripts[n]`` after a prompt of n tokens."""
    tokens = tokenizer()
    config = GPT2Config(
        vocab_size=len(tokens),
        n_positions=POSITIONS,
        n_embd=POSITIONS,
        n_layer=1,
        n_head=4,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wpe.weight.copy_(torch.eye(POSITIONS))
        for length, script in scripts.items():
            for position, token in enumerate(script, length - 1):
                assert not model.lm_head.weight[:, position].any(), "two scripts overlap"
                model.lm_head.weight[token, position] = 1.0
    model.half().save_pretrained(folder)
    tokens.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
