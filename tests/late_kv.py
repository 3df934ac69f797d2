"""KV connectors that take their time: vLLM's example, but asynchronous.

vLLM imports them by this module's name. One brings the keys and values of prompts that another
engine has written, the other also writes those of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from vllm.distributed import get_tensor_model_parallel_rank
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
    ended: dict[str, ReqMeta] = field(default_factory=dict)  # what is sent of them


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


class SendingConnector(LateConnector):
    """When a request has ended it keeps its blocks, and writes its prompt's some steps later.

    With tensor parallelism each rank has its own files: it has its own heads.
    """

    decodes_in_windows = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.to_send: dict[str, ReqMeta] = {}  # from the coming turn on
        self.sending: dict[str, tuple[ReqMeta, int]] = {}  # and the steps that are left

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        prompt = list(request.prompt_token_ids)
        meta = ReqMeta.make_meta(prompt, block_ids, self._block_size, True, [])
        size = len(meta.token_ids)
        is_here = 0 < size <= request.num_computed_tokens
        if not is_here or self._found_match_for_request(request):
            return False, None
        self.to_send[request.request_id] = meta
        return True, None

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        loads = super().build_connector_meta(scheduler_output)
        loads.ended, self.to_send = self.to_send, {}
        return loads

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        for request_id, meta in self._get_connector_metadata().ended.items():
            self.sending[request_id] = meta, STEPS

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        _, received = super().get_finished(finished_req_ids)
        sent = set()
        for request_id, (meta, left) in list(self.sending.items()):
            self.sending[request_id] = meta, left - 1
            if left == 1:
                self._send(meta)
                del self.sending[request_id]
                sent.add(request_id)
        return sent, received

    def _send(self, meta: ReqMeta) -> None:
        size = self._block_size
        blocks, offsets = meta.slot_mapping // size, meta.slot_mapping % size
        for name, layer in self.layers.items():
            if getattr(layer, "kv_cache", None) is not None:
                file = self._generate_filename_debug(name, meta.token_ids, meta.mm_hashes)
                kv = layer.kv_cache[blocks, :, offsets]
                safetensors.torch.save_file({"kv_cache": kv.contiguous()}, file)

    def _generate_filename_debug(self, layer_name: str, *args: Any) -> str:
        rank = get_tensor_model_parallel_rank()
        name = f"{layer_name}.{rank}" if rank else layer_name
        file: str = super()._generate_filename_debug(name, *args)
        return file
