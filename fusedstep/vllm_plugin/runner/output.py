"""A window's output, and a stock step's part of its input, in vLLM's form."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsLists, ModelRunnerOutput

from fusedstep.vllm_plugin.grammar_tables import bring_grammars, grammars_of
from fusedstep.vllm_plugin.stamps import report_limit, report_rounds

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput

    from fusedstep.counts import WindowCounts
    from fusedstep.vllm_plugin.runner.experts import Outputs
    from fusedstep.vllm_plugin.runner.tracing import TracedStep
    from fusedstep.window.output import WindowTokens


T = TypeVar("T")


class WindowOutput(AsyncModelRunnerOutput):  # type: ignore[misc]
    """A window's tokens in vLLM's form; requests left out of the batch get none."""

    def __init__(
        self,
        scheduler_output: SchedulerOutput,
        tokens: Callable[[], WindowTokens],  # waits for them
        live: np.ndarray,  # [num_reqs of the window] int64, place in the scheduled batch
        counts: WindowCounts,
        kv_connector_output: KVConnectorOutput | None,
        limit: str | None = None,  # the reason of fewer steps than were reserved
        experts: Outputs | None = None,  # None: nobody asks for them
    ) -> None:
        self.req_ids = list(scheduler_output.num_scheduled_tokens)
        self.tokens, self.live, self.counts = tokens, live, counts
        self.kv_connector_output, self.limit = kv_connector_output, limit
        self.experts = experts
        self.trace: TracedStep | None = None

    def tell(self, trace: TracedStep) -> None:
        self.trace = trace

    def get_output(self) -> ModelRunnerOutput:
        result = self.tokens()
        if self.trace is not None:
            self.trace.write(reason=None, has_tokens=True)
        token_ids = self._of_all(result.token_ids)
        self.counts.tokens += sum(map(len, token_ids))
        self.counts.steps += result.num_steps
        logprobs = None
        if result.logprobs is not None:
            logprobs = LogprobsLists(
                result.logprob_token_ids,
                result.logprobs,
                result.ranks,
                [0, *accumulate(map(len, token_ids))],
            )
        output = ModelRunnerOutput(
            req_ids=self.req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(self.req_ids)},
            sampled_token_ids=token_ids,
            logprobs=logprobs,
            kv_connector_output=self.kv_connector_output,
        )
        if self.experts is not None:
            output.aux_output_connector_output = self.experts(result.num_sampled)
        if self.limit is not None:
            report_limit(output, self.limit)
        if result.rounds is not None:
            report_rounds(output, self._of_all(result.rounds))
        return output

    def _of_all(self, of_live: list[list[T]]) -> list[list[T]]:
        """Lists of the window's requests, as those of the scheduled batch."""
        lists: list[list[T]] = [[] for _ in self.req_ids]
        for index, entries in zip(self.live.tolist(), of_live, strict=True):
            lists[index] = entries
        return lists

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
