"""A KV connector whose loads take their time: vLLM's example, but asynchronous.

vLLM imports it by this module's name. It brings the keys and values of prompts that vLLM's
ExampleConnector has written as a producer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
    ExampleConnector,
    ReqMeta,
)

STEPS = 4  # of the engine, from the start of a load to its end


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]
    """Of one turn: request_id -> what is loaded for it."""

    starting: dict[str, ReqMeta] = field(default_factory=dict)


class SilentConnector(ExampleConnector):  # type: ignore[misc]
    """Says nothing of windows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.to_load: dict[str, ReqMeta] = {}  # of the coming turn
        self.loading: dict[str, tuple[ReqMeta, int]] = {}  # and the steps that are left
        self.offered: set[str] = set()  # of which request: a load that failed is not tried again
        self.failed: set[int] = set()  # blocks
        self.layers: dict[str, Any] = {}

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        if request.request_id in self.offered:
            return 0, False
        matched, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return max(matched, 0), matched > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            self.offered.add(request.request_id)
            block_ids = blocks.get_block_ids()[0]
            self.to_load[request.request_id] = ReqMeta.make_meta(
                list(request.prompt_token_ids), block_ids, self._block_size, False, []
            )

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        starting, self.to_load = self.to_load, {}
        return Loads(starting)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.layers = forward_context.no_compile_layers
        for request_id, meta in self._get_connector_metadata().starting.items():
            self.loading[request_id] = meta, STEPS

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        self._get_connector_metadata()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        """Called once after every step."""
        done = set()
        for request_id, (meta, left) in list(self.loading.items()):
            self.loading[request_id] = meta, left - 1
            if left == 1:
                self._load(meta)
                del self.loading[request_id]
                done.add(request_id)
        return None, done

    def _load(self, meta: ReqMeta) -> None:
        size = self._block_size
        blocks, offsets = meta.slot_mapping // size, meta.slot_mapping % size
        for name, layer in self.layers.items():
            if getattr(layer, "kv_cache", None) is None:
                continue
            file = self._generate_filename_debug(name, meta.token_ids, meta.mm_hashes)
            if Path(file).exists():
                layer.kv_cache[blocks, :, offsets] = safetensors.torch.load_file(file)["kv_cache"]
            else:
                self.failed |= set(blocks.tolist())

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self.failed = self.failed, set()
        return failed


class LateConnector(SilentConnector):
    """A decode step needs nothing of it but to be told that the step has ended."""

    decodes_in_windows = True
