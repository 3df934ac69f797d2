"""The entries of the lists of patches."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """How vLLM is changed."""

    REPLACED = "replaced"  # a function or class, for the life of the process
    LENT = "lent"  # replaced during one call
    HUNG = "hung"  # an attribute that vLLM's class has not
    SET = "set"  # a field of vLLM's, outside of its own methods
    ADDED = "added"  # an entry of a registry


class Patch(NamedTuple):
    """One change. ``by`` is the file under vllm_plugin/, ``target`` what stands there."""

    by: str
    target: str  # a pattern of fnmatch
    kind: Kind
    of: str  # vLLM's (or another library's) name
    why: str
