"""KV-cache blocks that running requests hold ahead of their tokens, and what others need meanwhile.

A window that ends early leaves its requests with blocks that they use only later. Stock vLLM has
those free. So that no request is preempted for them, enough blocks stay free, as long as some are
held ahead, for all running requests to continue until those are used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.v1.core.single_type_kv_cache_manager import CrossAttentionManager, MambaManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request


class Blocks:
    """Blocks by vLLM's own arithmetic, over all groups of the KV cache."""

    def __init__(self, manager: KVCacheManager, max_model_len: int, round_tokens: int = 0) -> None:
        """``round_tokens``: that a speculative round takes beside its first; 0 without rounds."""
        self.manager, self.max_model_len = manager, max_model_len
        self.round_tokens = round_tokens
        # Not those of the encoder's keys: a request has them all from its prefill on.
        self.groups = [
            group
            for group in manager.coordinator.single_type_managers
            if not isinstance(group, CrossAttentionManager)
        ]
        states: list[MambaManager] = [g for g in self.groups if isinstance(g, MambaManager)]
        # Groups that cache recurrent states: a request holds those of its last blocks only.
        self.state_groups = [group for group in states if group.mamba_cache_mode == "align"]
        # Tokens of such a block: vLLM gives a request one more of them in a turn, and asserts it.
        self.state_block: int = min((g.block_size for g in self.state_groups), default=1 << 30)

    @property
    def num_free(self) -> int:
        """Free blocks; cached ones that nobody uses are free too."""
        free: int = self.manager.block_pool.get_num_free_blocks()
        return free

    def at_most(self, num_tokens: int) -> int:
        """Blocks that a request can need for so many tokens more."""
        return sum(-(-num_tokens // group.block_size) for group in self.groups)

    def needed(self, request: Request, num_tokens: int) -> int:
        """Blocks that the request lacks until it can hold ``num_tokens`` tokens, or ends: a window
        of rounds reserves beyond its end."""
        num_tokens = min(num_tokens, self.max_model_len)
        if not self.round_tokens:
            num_tokens = min(num_tokens, request.num_prompt_tokens + request.max_tokens)
        with self._planned_checkpoints(request.request_id):
            needed: int = self.manager.coordinator.get_num_blocks_to_allocate(
                request_id=request.request_id,
                num_tokens=num_tokens,
                new_computed_blocks=self.manager.empty_kv_cache_blocks.blocks,
                num_encoder_tokens=0,
                total_computed_tokens=request.num_computed_tokens,
                num_local_computed_tokens=request.num_computed_tokens,
                num_tokens_main_model=num_tokens,
            )
        # It counts one block of a state, which is all that a turn adds. Those before it get free
        # only when the windows in flight have come back: two at most.
        for group in self.state_groups:
            held = len(group.req_to_blocks.get(request.request_id, ()))
            needed += min(max(-(-num_tokens // group.block_size) - held - 1, 0), 2)
        return needed

    @contextmanager
    def _planned_checkpoints(self, request_id: str) -> Iterator[None]:
        """To ask for a number of blocks also plans the state's checkpoint that a prefill of so many
        tokens would write: undone here, for this only asks."""
        plans: list[dict[str, object]] = [group._checkpoints for group in self.state_groups]
        before = [plan.get(request_id) for plan in plans]
        try:
            yield
        finally:
            for plan, known in zip(plans, before, strict=True):
                plan.pop(request_id, None)
                if known is not None:
                    plan[request_id] = known

    def most_tokens_ahead(self, requests: Collection[Request]) -> int:
        """The number of further tokens after which none of them holds more blocks than stock vLLM
        would have given it.

        Blocks reserved for the coming window are counted, or for a step after a window in flight:
        these may end early.
        """
        begun = -1
        for request in requests:
            last, reserved = 0, len(request.spec_token_ids)
            if reserved or request.num_output_placeholders > 1:
                last = request.num_computed_tokens + reserved
            for group in self.groups:
                held = len(group.req_to_blocks.get(request.request_id, ())) - 1
                size = group.block_size
                begun = max(begun, max(held, last // size) * size - request.num_tokens)
        return 1 + begun

    def held_ahead(self, requests: Collection[Request]) -> int:
        """Blocks that they hold and that stock's scheduler would not have given them yet."""
        return sum(
            max(0, len(group.req_to_blocks.get(r.request_id, ())) - -(-r.num_tokens // size))
            for group in self.groups
            for size in (group.block_size,)
            for r in requests
        )

    def to_go_on(self, running: Collection[Request], num_tokens: int) -> int:
        """Blocks that all of them lack for ``num_tokens`` tokens more and the next turn's; a quick
        bound if it fits."""
        num_tokens += self.round_tokens
        bound = len(running) * self.at_most(num_tokens + 1)
        bound += sum(
            self.at_most(r.num_tokens - r.num_computed_tokens)
            for r in running
            if r.is_prefill_chunk
        )
        if 2 * bound <= self.num_free:
            return bound
        return sum(self.needed(r, r.num_tokens + num_tokens) for r in running)
