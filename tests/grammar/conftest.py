"""Two tokenizers: the bundled model's (bytes as characters), and one with byte fallback."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import xgrammar
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusedstep.grammar import Vocabulary


@dataclass(frozen=True)
class World:
    """A tokenizer, as xgrammar and as fusedstep.grammar see it."""

    info: xgrammar.TokenizerInfo
    compiler: xgrammar.GrammarCompiler
    vocabulary: Vocabulary


def _world(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> World:
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    compiler = xgrammar.GrammarCompiler(info, max_threads=2)
    return World(info, compiler, Vocabulary.of(info))


@pytest.fixture(scope="session")
def bundled(model: str) -> World:
    """The bundled model's tokenizer: 49152 tokens."""
    return _world(AutoTokenizer.from_pretrained(model), 49152)


def fallback_tokens() -> list[str]:
    """<0xNN> for every byte, letters with and without a space before, and pieces of JSON."""
    letters = [chr(c) for c in range(0x21, 0x7F)]
    pieces = ['"', '":', '","', '{"', '"}', "}}", "]]", "[{", "true", "false", "null", "the", "ab"]
    more = [
        "\\u",
        '\\"',
        "é",
        "ü",
        "日",
        "本",
        "🙂",
        "00",
        "12",
        "2024",
        "-",
        "name",
        "age",
        "<tool",
    ]
    words = [*letters, *pieces, *more]
    tokens = ["<unk>", "<s>", "</s>", "<|tool|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return list(dict.fromkeys([*tokens, "▁", "▁▁", *words, *("▁" + word for word in words)]))


@pytest.fixture(scope="session")
def fallback() -> World:
    """A tokenizer as Llama 2's: ▁ for a space, <0xNN> for a byte; ids up to no round number."""
    tokens = fallback_tokens()
    core = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|tool|>"],
    )
    world = _world(tokenizer, len(tokens) + 7)
    assert world.info.vocab_type == xgrammar.VocabType.BYTE_FALLBACK
    return world
