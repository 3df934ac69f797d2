"""Data-parallel ranks of a mixture of experts: all run the same number of forward passes.

Every MoE layer communicates, so a rank that ran a step more or less than the others would wait for
ever, or read another step's tokens. Once per turn the ranks say how many steps each could run; the
least is what all run, and a rank without requests joins them with dummy batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from vllm.distributed.parallel_state import get_dp_group
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.dp_utils import DPSyncState

# Of a rank that has nothing to decode: it runs as many steps as the others.
JOINS = 1 << 16
# Rows of the tensor that ``vllm.v1.worker.gpu.dp_utils`` sums before every step, a column for each
# rank. 1 and 3, cudagraph mode and query length, stay 0 and -1: eager on all ranks.
NUM_TOKENS, UNIFORM, QUERY_LEN, STEPS_MORE, NUM_REQS, ROWS = 0, 2, 3, 4, 5, 6


class Agreement(NamedTuple):
    """Steps that all ranks run in this turn."""

    num_steps: int
    sync: DPSyncState  # the tokens of each rank, in every step
    is_cut: bool  # this rank would run more


class Ranks:
    """This rank's part in the agreement, which is vLLM's own all-reduce with K in one of its rows.

    The row is vLLM's ``allow_ubatching``, which asks for microbatches only where every rank says 1.
    A rank that takes a stock step says 0, no step more than one, and does not notice anything.
    """

    def __init__(self, dp_size: int, dp_rank: int) -> None:
        self.dp_size, self.dp_rank = dp_size, dp_rank
        self.cut = 0  # windows of which the others wanted less
        self.joined = 0  # dummy steps

    def agree(self, num_reqs: int, num_steps: int) -> Agreement:
        """This rank has ``num_reqs`` tokens in each of up to ``num_steps`` steps.

        ``JOINS``: what the others run; one step where nobody has a request.
        """
        table = torch.zeros(ROWS, self.dp_size, dtype=torch.int32)
        mine = table[:, self.dp_rank]
        mine[NUM_TOKENS] = mine[NUM_REQS] = num_reqs
        mine[UNIFORM], mine[QUERY_LEN] = 1, -1
        mine[STEPS_MORE] = num_steps if num_steps == JOINS else num_steps - 1
        torch.distributed.all_reduce(table, group=get_dp_group().cpu_group)
        more = int(table[STEPS_MORE].min())
        agreed = 1 if more == JOINS else 1 + more
        is_cut = agreed < num_steps < JOINS
        self.cut += is_cut
        return Agreement(
            agreed,
            DPSyncState(
                num_tokens_across_dp=table[NUM_TOKENS],
                uniform_token_count=None,
                eager=True,
                num_reqs=int(table[NUM_REQS].max()),
            ),
            is_cut,
        )

    def join(self, run: Callable[[], object], agreement: Agreement | None = None) -> None:
        """``run`` a dummy batch for every step of the others, without an agreement for each."""
        num_steps, sync, _ = agreement or self.agree(1, JOINS)
        self.joined += num_steps
        with _agreed(sync):
            for _ in range(num_steps):
                run()

    def as_dict(self) -> dict[str, int]:
        return {"cut": self.cut, "joined_steps": self.joined}


@contextmanager
def _agreed(sync: DPSyncState) -> Iterator[None]:
    """Model Runner V2 takes the agreement that was made, and makes none."""
    stock = model_runner.dispatch_cg_and_sync_dp

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, dp_sync_state=sync, **kwargs)

    model_runner.dispatch_cg_and_sync_dp = dispatch
    try:
        yield
    finally:
        model_runner.dispatch_cg_and_sync_dp = stock
