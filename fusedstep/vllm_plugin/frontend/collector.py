"""Outputs that wait for a client, one per token: vLLM's collector would join them."""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

Output: TypeAlias = RequestOutput | PoolingRequestOutput | Exception
# A client that is further behind gets several tokens at a time, as in stock vLLM one that is two
# behind does: what waits for a client that does not read has an end.
MOST_WAITING = 4096


class TokenCollector(RequestOutputCollector):  # type: ignore[misc]
    """A queue in place of the one output that vLLM's has room for.

    What vLLM makes of one step stays one output: the tokens of several choices (n > 1).
    """

    def __init__(self, output_kind: RequestOutputKind, request_id: str) -> None:
        super().__init__(output_kind, request_id)
        self.is_cumulative = output_kind is RequestOutputKind.CUMULATIVE
        self.waiting: deque[Output] = deque()

    def put(self, output: Output) -> None:
        waiting = self.waiting
        last = waiting[-1] if waiting else None
        if isinstance(last, Exception) and not isinstance(output, Exception):
            return
        if isinstance(last, Exception | PoolingRequestOutput):
            waiting[-1] = output
        elif isinstance(last, RequestOutput) and self._joins(last, output):
            last.add(output, self.aggregate)
        else:
            waiting.append(output)
        if self.is_cumulative and isinstance(output, RequestOutput):
            _keep(output)
        self.ready.set()

    async def get(self) -> RequestOutput | PoolingRequestOutput:
        while not self.waiting:
            await self.ready.wait()
        return self._take()

    def get_nowait(self) -> RequestOutput | PoolingRequestOutput | None:
        return self._take() if self.waiting else None

    def _take(self) -> RequestOutput | PoolingRequestOutput:
        output = self.waiting.popleft()
        if not self.waiting:
            self.ready.clear()
        if isinstance(output, Exception):
            raise output
        return output

    def _joins(self, last: RequestOutput, output: Output) -> bool:
        """Is it of the same step, or too much?"""
        if not isinstance(output, RequestOutput) or not (last.outputs and output.outputs):
            return False  # without completions: the end of a stream, which vLLM knows by identity
        if len(self.waiting) >= MOST_WAITING:
            return True
        indices = {completion.index for completion in last.outputs}
        return all(completion.index not in indices for completion in output.outputs)


def _keep(output: RequestOutput) -> None:
    """A cumulative output holds the lists that vLLM goes on extending: while it waits, its own."""
    for completion in output.outputs:
        completion.token_ids = list(completion.token_ids)
        if completion.logprobs is not None:
            completion.logprobs = completion.logprobs[:]
