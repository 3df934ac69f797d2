"""Cross-attention in the steps of a window: to the encoder's keys, which a prefill has written.

They and their number stay the same while a request decodes, so one plan serves all steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.kv_cache_interface import CrossAttentionSpec

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.encoder_decoder import EncoderDecoderModelState
    from vllm.v1.worker.utils import AttentionGroup


def attends_across(group: AttentionGroup) -> bool:
    return isinstance(group.kv_cache_spec, CrossAttentionSpec)


class EncoderLengths:
    """The encoder tokens of each row of a window, for the KV-cache groups that attend to them."""

    def __init__(self, runner: GPUModelRunner, groups: list[AttentionGroup]) -> None:
        """``groups``: those with cross-attention."""
        state: EncoderDecoderModelState = runner.model_state
        self.features = state.encoder_cache.mm_features
        self.req_ids = runner.req_states.index_to_req_id
        self.group_ids = {group.kv_cache_group_id for group in groups}
        self.lengths = np.zeros(runner.max_num_reqs, dtype=np.int32)

    def stage(self, rows: np.ndarray) -> None:
        for index, row in enumerate(rows.tolist()):
            features = self.features.get(self.req_ids[row], ())
            self.lengths[index] = sum(each.mm_position.get_num_embeds() for each in features)

    def describe(self, metadata: list[CommonAttentionMetadata]) -> None:
        """Adds the lengths to the ``metadata`` of those groups; it has one entry for each group.

        Host memory is the device's: ``reasons.py`` lets such models decode in windows on a CPU.
        """
        for group_id in self.group_ids:
            common = metadata[group_id]
            lengths = self.lengths[: common.num_reqs]
            common.encoder_seq_lens = torch.from_numpy(lengths)
            common.encoder_seq_lens_cpu = lengths
