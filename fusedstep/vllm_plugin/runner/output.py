"""A window's output, and a stock step's part of its input, in vLLM's form."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsLists, ModelRunnerOutput

from fusedstep.vllm_plugin.grammar_tables import bring_grammars, grammars_of
from fusedstep.window.state import Fetched, WindowSlot

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput

    from fusedstep.counts import WindowCounts
    from fusedstep.vllm_plugin.runner.tracing import TracedStep


class WindowOutput(AsyncModelRunnerOutput):  # type: ignore[misc]
    """A window's tokens in vLLM's form; requests left out of the batch get none."""

    def __init__(
        self,
        scheduler_output: SchedulerOutput,
        slot: WindowSlot,
        live: np.ndarray,  # [num_reqs of the window] int64, place in the scheduled batch
        counts: WindowCounts,
        copy_stream: torch.cuda.Stream | None,
        kv_connector_output: KVConnectorOutput | None,
    ) -> None:
        self.req_ids = list(scheduler_output.num_scheduled_tokens)
        self.fetched = Fetched(slot, copy_stream)
        self.live, self.counts = live, counts
        self.kv_connector_output = kv_connector_output
        self.trace: TracedStep | None = None

    def tell(self, trace: TracedStep) -> None:
        self.trace = trace

    def get_output(self) -> ModelRunnerOutput:
        result = self.fetched.tokens()
        if self.trace is not None:
            self.trace.write(reason=None, has_tokens=True)
        token_ids: list[list[int]] = [[] for _ in self.req_ids]
        counts = np.zeros(len(self.req_ids), dtype=np.int64)
        for index, tokens in zip(self.live.tolist(), result.token_ids, strict=True):
            token_ids[index] = tokens
        counts[self.live] = result.num_sampled
        self.counts.tokens += int(counts.sum())
        self.counts.steps += result.num_steps
        logprobs = None
        if result.logprobs is not None:
            logprobs = LogprobsLists(
                result.logprob_token_ids,
                result.logprobs,
                result.ranks,
                np.concatenate(([0], np.cumsum(counts))).tolist(),
            )
        return ModelRunnerOutput(
            req_ids=self.req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(self.req_ids)},
            sampled_token_ids=token_ids,
            logprobs=logprobs,
            kv_connector_output=self.kv_connector_output,
        )

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        """vLLM 0.33 asks when ``get_output`` failed."""
        return self.kv_connector_output


def one_step_each(scheduler_output: SchedulerOutput, num_drafts: int) -> SchedulerOutput:
    """Take off the placeholders of a window: a stock step computes one token of each decoding
    request, and verifies at most ``num_drafts``."""
    placeholders = scheduler_output.scheduled_spec_decode_tokens
    too_many = {
        req_id: len(tokens) - num_drafts
        for req_id, tokens in placeholders.items()
        if len(tokens) > num_drafts
    }
    if not too_many:
        return scheduler_output
    scheduled = {
        req_id: n - too_many.get(req_id, 0)
        for req_id, n in scheduler_output.num_scheduled_tokens.items()
    }
    kept = {req_id: tokens[:num_drafts] for req_id, tokens in placeholders.items() if num_drafts}
    single = replace(
        scheduler_output,
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens=kept,
    )
    bring_grammars(single, grammars_of(scheduler_output))
    return single
