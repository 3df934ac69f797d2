"""A tokenizer's tokens as bytes, and the tree of their common beginnings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusedstep.grammar.walks import plant

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import xgrammar

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tree:
    """The tokens that have bytes as a tree of bytes, its nodes in depth-first order.

    ``order`` holds the token ids sorted by their bytes. The tokens that end at node n are
    ``order[tokens[n] : ends[n]]``; those at n or below it ``order[tokens[n] : tokens[after[n]]]``.
    ``level_*`` is the same tree level by level, its node 0 for tokens without bytes, 1 the root.
    """

    order: Ints  # [num_tokens]
    depth: Ints  # [num_nodes], from 1
    byte: npt.NDArray[np.uint8]  # [num_nodes]
    after: Ints  # [num_nodes]: the next node that is not below this one
    tokens: Ints  # [num_nodes + 1]
    ends: Ints  # [num_nodes]
    level_parent: npt.NDArray[np.uint32]  # [2 + num_nodes]
    level_byte: npt.NDArray[np.uint8]  # [2 + num_nodes]
    level_node: npt.NDArray[np.uint32]  # [number of token ids, rounded up to 32]


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of all tokens, as xgrammar sees them: a special token may be text.

    Tokens without text, ids without a token and stop tokens of every request have none.
    """

    offsets: Ints  # [num_tokens + 1]
    data: npt.NDArray[np.uint8]
    tree: Tree

    @staticmethod
    def of(tokenizer: xgrammar.TokenizerInfo, stop_token_ids: Iterable[int] = ()) -> Vocabulary:
        """The vocabulary that xgrammar's masks are about.

        ``stop_token_ids``: those of every request, as a model's generation config has them. Their
        text could be taken for text of the grammar where any text may come.
        """
        tokens: list[bytes] = list(tokenizer.decoded_vocab)
        tokens += [b""] * (tokenizer.vocab_size - len(tokens))
        for token in (
            *tokenizer.special_token_ids,
            *tokenizer.stop_token_ids,
            *stop_token_ids,
        ):
            tokens[token] = b""
        return Vocabulary.from_bytes(tokens)

    @staticmethod
    def from_bytes(tokens: Sequence[bytes]) -> Vocabulary:
        """A vocabulary of these tokens."""
        offsets = np.zeros(len(tokens) + 1, np.int32)
        np.cumsum([len(token) for token in tokens], out=offsets[1:])
        data = np.frombuffer(b"".join(tokens), np.uint8).copy()
        order = sorted((i for i, token in enumerate(tokens) if token), key=tokens.__getitem__)
        sorted_ids = np.array(order, np.int32)
        return Vocabulary(offsets, data, Tree(sorted_ids, *plant(offsets, data, sorted_ids)))

    @property
    def size(self) -> int:
        """The number of token ids, those without bytes included."""
        return len(self.offsets) - 1
