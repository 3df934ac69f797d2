"""FusedStepScheduler: vLLM's AsyncScheduler, which reserves K tokens per decoding request.

A window of K steps looks to vLLM's scheduler like speculative decoding whose K-1 drafts are all
accepted: placeholders make it allocate KV-cache blocks for K tokens, and ``update_from_output``
takes back what the window did not use.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from fusedstep.errors import ConfigError
from fusedstep.policy import Decision, DecodingRequest, Turn, decide
from fusedstep.vllm_plugin import compat
from fusedstep.vllm_plugin.arrivals import arrival_counter
from fusedstep.window import arrivals

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

logger = logging.getLogger("vllm.fusedstep")


class FusedStepScheduler(AsyncScheduler):  # type: ignore[misc]
    """With K fixed at 1 this is exactly vLLM's AsyncScheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.decode_steps = compat.options(self.vllm_config).decode_steps
        if self.decode_steps.fixed != 1:
            refuse_foreign_worker(self.vllm_config)
        self.engine_reason = compat.engine_reason(self.vllm_config)
        self.stock_reasons: dict[str, str] = {}  # request_id -> why its batch takes stock steps
        self.last_decision = Decision(1, "nothing scheduled yet")
        self.arrivals = arrival_counter(self.vllm_config)
        self.arrivals.unlink()  # the workers, started before, have it mapped
        self.num_added = 0
        if self.engine_reason is not None:
            logger.warning("fusedstep: stock steps only (%s)", self.engine_reason)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Decide K at the start of the turn, where the waiting queue is in view."""
        if self.decode_steps.fixed == 1 or self.engine_reason is not None:
            return super().schedule(throttle_prefills)
        self._reserve_window()
        scheduler_output = super().schedule(throttle_prefills)
        # A request that comes now can be admitted in the next turn: it may end this window.
        open_house = len(self.running) < self.max_num_active_reqs
        scheduler_output.arrivals_seen = self.num_added if open_house else arrivals.ALL
        return scheduler_output

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        self.num_added += 1
        reason = compat.request_reason(request.sampling_params)
        if reason is not None:
            self.stock_reasons[request.request_id] = reason

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> SpecDecodingStats | None:
        """None for windows: their placeholders are not drafts."""
        if self.num_spec_tokens == 0:
            return None
        return super().make_spec_decoding_stats(*args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.stock_reasons.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _reserve_window(self) -> None:
        """Place K-1 placeholders on every running request that decodes."""
        decoding: list[tuple[Request, int]] = []
        prefill_in_flight = streams = stop_strings = False
        for request in self.running:
            if request.is_prefill_chunk:
                prefill_in_flight = True
                continue
            remaining = self._remaining(request)
            if remaining <= 0:
                # What is in flight reaches its limit: sit this turn out. If the window ends
                # early after all, its unused reservation comes back and so does the request.
                request.next_decode_eligible_step = self.current_step + 2
                continue
            decoding.append((request, remaining))
            params = request.sampling_params
            streams |= params.output_kind is not RequestOutputKind.FINAL_ONLY
            stop_strings |= bool(params.stop)

        decision = self.last_decision = decide(
            self.decode_steps,
            Turn(
                decoding=[DecodingRequest(n, r.num_computed_tokens) for r, n in decoding],
                prefill_in_flight=prefill_in_flight,
                admissible=self._can_admit(),
                stock_reason=self._stock_reason(),
                streams=streams,
                stop_strings=stop_strings,
                token_budget=self.max_num_scheduled_tokens,
                free_blocks=self.kv_cache_manager.block_pool.get_num_free_blocks(),
                block_size=self._min_block_size,
            ),
        )
        for request, remaining in decoding:
            request.spec_token_ids = [-1] * (min(decision.num_steps, remaining) - 1)

    @property
    def _min_block_size(self) -> int:
        """Smallest block size over all KV-cache groups, as if one group held every block."""
        groups = self.kv_cache_config.kv_cache_groups
        smallest: int = min(g.kv_cache_spec.block_size for g in groups)
        return max(smallest // len(groups), 1)

    def _remaining(self, request: Request) -> int:
        """Tokens the request can still take when everything in flight is delivered in full."""
        in_flight: int = request.num_output_placeholders
        to_max_tokens: int = request.max_tokens - request.num_output_tokens
        to_max_model_len: int = self.max_model_len - request.num_tokens
        return min(to_max_tokens, to_max_model_len) - in_flight

    def _can_admit(self) -> bool:
        """Could the first waiting request start in this turn? An estimate that may say yes."""
        queue = self.kv_holding_waiting or self.waiting
        if not queue or len(self.running) >= self.max_num_active_reqs:
            return False
        blocks = -(-queue.peek_request().num_tokens // self._min_block_size)
        return bool(blocks <= self.kv_cache_manager.block_pool.get_num_free_blocks())

    def _stock_reason(self) -> str | None:
        if not self.stock_reasons:
            return None
        reasons = (self.stock_reasons.get(r.request_id) for r in self.running)
        return next((reason for reason in reasons if reason), None)


def refuse_foreign_worker(vllm_config: VllmConfig) -> None:
    """Placeholders under a runner that does not know them corrupt output silently: refuse."""
    worker_cls = vllm_config.parallel_config.worker_cls
    if worker_cls == compat.WORKER_CLS:
        return
    if isinstance(worker_cls, str) and worker_cls != "auto":
        worker_cls = resolve_obj_by_qualname(worker_cls)
    if not getattr(worker_cls, "runs_windows", False):
        raise ConfigError(
            f"FusedStepScheduler needs fusedstep's worker: add --worker-cls {compat.WORKER_CLS} "
            "(or fix decode steps at 1)"
        )
