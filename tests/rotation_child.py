"""In an engine's child process: ``--rope fused``, and the controls of its tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import features_child
from features_child import Ask

Change = Callable[[Any], Any]


def layers() -> dict[str, int]:
    """Attention layers by what became of ``--rope fused``."""

    def of(worker: Any) -> dict[str, int]:
        return dict(worker.model_runner.rotations)

    return features_child.OPEN[2].collective_rpc(of)[0]


def parameters() -> list[str]:
    """Names of the model's parameters: an update of the weights finds them by these."""

    def of(worker: Any) -> list[str]:
        return [name for name, _ in worker.model_runner.model.named_parameters()]

    return features_child.OPEN[2].collective_rpc(of)[0]


def ask(model: str, options: dict[str, Any], asks: list[Ask], fault: str | None = None) -> Any:
    """The answers, with a fault in our attention."""
    features_child.use(model, options)
    with ExitStack() as stack:
        if fault is not None:
            FAULTS[fault](stack)
        return features_child.ask(model, options, asks)["answers"]


def _turned(rotation: Any) -> Any:
    return replace(rotation, cos_sin=rotation.cos_sin.roll(-1, 0))


def _not_normed(rotation: Any) -> Any:
    return replace(rotation, query_norm=None, key_norm=None)


def _in_decode(change: Change, stack: ExitStack) -> None:
    from fusedstep.vllm_plugin.attention import FusedStepAttentionImpl

    stock = FusedStepAttentionImpl.decode_layer

    def decode_layer(self: Any, layer: Any = None) -> Any:
        found = stock(self, layer)
        return replace(found, rotation=change(found.rotation))

    stack.enter_context(patch.object(FusedStepAttentionImpl, "decode_layer", decode_layer))


def _in_prefills(change: Change, stack: ExitStack) -> None:
    from fusedstep.vllm_plugin import attention

    stock = attention.rotate
    stack.enter_context(
        patch.object(attention, "rotate", lambda rotation, *args: stock(change(rotation), *args))
    )


FAULTS: dict[str, Callable[[ExitStack], None]] = {
    "decodes a position too far": lambda stack: _in_decode(_turned, stack),
    "prefills a position too far": lambda stack: _in_prefills(_turned, stack),
    "decodes without norm": lambda stack: _in_decode(_not_normed, stack),
    "prefills without norm": lambda stack: _in_prefills(_not_normed, stack),
}
