"""Before a form serves: on made-up requests its tokens must be those of the eager loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fusedstep.errors import FusedStepError
from fusedstep.ops.types import (
    FREE,
    BatchNeeds,
    GrammarState,
    SamplingState,
    StepState,
    off_value,
)
from fusedstep.window.graphs import UNROLLED_STEPS, WindowGraphs
from fusedstep.window.loop import HOST_PACE, Graphs, run_window
from fusedstep.window.pace import Pace
from fusedstep.window.state import Fetched, WindowSlot

CONTEXT = 5  # tokens that each request has computed
STEPS = UNROLLED_STEPS + 2  # so that the unrolled form shows both of its graphs
STOPS_AFTER = 3  # steps, the second request
RUNS_AGAIN = 3  # of the eager loop, where recorded steps gave other tokens


class WrongTokensError(FusedStepError):
    """Recorded steps did not do what the steps do that they were recorded from."""


class Proof:
    """Runs the same requests eagerly and recorded.

    Uses KV blocks 1, 2, ...: no request owns them yet (block 0 is vLLM's null block).
    """

    def __init__(
        self,
        state: StepState,  # no request is in it yet
        graphs: WindowGraphs,
        max_num_blocks: int,  # that may be used
        # (seq_lens, steps) -> rows with padding, LoRA adapters
        stage: Callable[[np.ndarray, int], tuple[int, int]],
        stream: torch.cuda.Stream | None = None,  # of the copies to the host
        pace: Pace = HOST_PACE,
        forget: Callable[[int], None] = lambda _: None,  # recurrent states in the first n blocks
        steps: int = STEPS,
        tokens_per_step: int = 1,
    ) -> None:
        self.state, self.graphs, self.steps = state, graphs, steps
        self.widths = [
            -(-(CONTEXT + (steps + 1) * tokens_per_step) // size)
            for size in state.inputs.block_sizes
        ]
        self.max_num_reqs = max_num_blocks // sum(self.widths)
        self.stage, self.stream, self.pace, self.forget = stage, stream, pace, forget

    def check(self, num_rows: int) -> None:
        """Raises WrongTokensError unless a batch of up to ``num_rows`` requests gives the same."""
        num_reqs = min(num_rows, self.max_num_reqs)
        # On the host: counts of each token id take as much memory as logits.
        before = [t[:num_reqs].to("cpu", copy=True) for t in vars(self.state.requests).values()]
        try:
            for needs in self.graphs.variants:
                eager = self._tokens(num_reqs, needs, None)
                recorded = self._tokens(num_reqs, needs, self.graphs)
                if recorded == eager:
                    continue
                if not self._varies(eager, num_reqs, needs):
                    raise WrongTokensError("its tokens are not those of the eager loop")
                if list(map(len, recorded)) != list(map(len, eager)):
                    raise WrongTokensError("it stops elsewhere than the eager loop")
        finally:
            for tensor, was in zip(vars(self.state.requests).values(), before, strict=True):
                tensor[:num_reqs] = was
            if self.state.grammar is not None:
                self.state.grammar.states[:num_reqs] = FREE

    def _varies(self, eager: list[list[int]], num_reqs: int, needs: BatchNeeds) -> bool:
        """Does the eager loop itself give other tokens from run to run? Then they prove nothing:
        some kernel of the model adds in any order."""
        return any(self._tokens(num_reqs, needs, None) != eager for _ in range(RUNS_AGAIN))

    def _tokens(self, num_reqs: int, needs: BatchNeeds, graphs: Graphs | None) -> list[list[int]]:
        """The tokens that a window of all requests gives."""
        self._make_up(num_reqs, needs)
        self.forget(1 + num_reqs * sum(self.widths))
        steps_allowed = np.full(num_reqs, self.steps, dtype=np.int32)
        steps_allowed[2::3] -= 1
        num_rows, num_loras = self.stage(np.full(num_reqs, CONTEXT + 1, dtype=np.int32), self.steps)
        slot = self.graphs.state.next_slot()
        num_logprobs = 0 if needs.logprobs else -1
        slot.stage(
            np.arange(num_reqs), steps_allowed, num_logprobs, needs, num_rows, num_loras=num_loras
        )
        return self._window(slot, graphs)

    def _window(self, slot: WindowSlot, graphs: Graphs | None) -> list[list[int]]:
        """Run it: the tokens of each row."""
        run_window(self.graphs.model, self.graphs.ops, slot, lambda: False, self.pace, graphs)
        return Fetched(slot, self.stream).tokens().token_ids

    def _make_up(self, num_reqs: int, needs: BatchNeeds) -> None:
        """Requests in the first rows: every other one samples, the second one stops early."""
        requests, sampling, stop = self.state.requests, self.state.sampling, self.state.stop
        rows = torch.arange(num_reqs, device=requests.stopped.device)
        requests.last_sampled_tokens[:num_reqs, 0] = 1 + rows
        requests.num_computed_tokens[:num_reqs] = CONTEXT
        requests.total_len[:num_reqs] = CONTEXT + 1
        requests.prompt_len[:num_reqs] = CONTEXT + 1
        requests.all_token_ids[:num_reqs, : CONTEXT + 1] = 1 + rows[:, None].int()
        for untouched in (requests.prompt_bin_mask, requests.output_bin_counts, requests.stopped):
            untouched[:num_reqs] = 0
        vocab_size = requests.output_bin_counts.shape[1]
        for name, spec in SamplingState.parameters().items():
            if spec.width is None:
                asked = spec.on is not None and spec.need is not None and getattr(needs, spec.need)
                value = spec.on if asked else off_value(spec, vocab_size)
                getattr(sampling, name)[:num_reqs] = value
        sampling.temperature[:num_reqs] = (rows % 2).float()
        sampling.seeds[:num_reqs] = 1000 + rows
        if self.state.grammar is not None:
            _make_up_grammar(self.state.grammar)
            self.state.grammar.states[:num_reqs] = rows % 3 - 1 if needs.grammar else FREE
        stop.max_len[:num_reqs] = 1 << 30
        stop.max_len[1:2] = CONTEXT + 1 + STOPS_AFTER
        stop.num_stop_token_ids[:num_reqs] = 0
        first = 1
        for group, (table, width) in enumerate(
            zip(self.state.block_tables, self.widths, strict=True)
        ):
            blocks = torch.arange(num_reqs * width, dtype=torch.int32, device=table.device)
            table[:num_reqs, :width] = first + blocks.view(num_reqs, width)
            self.state.num_blocks[group, :num_reqs] = width
            first += num_reqs * width


def _make_up_grammar(grammar: GrammarState) -> None:
    """Two states that take turns; each forbids half of the tokens. No request has one yet."""
    grammar.token_starts.copy_(torch.arange(len(grammar.token_starts)))  # a byte each, of 0
    grammar.next_states[0, 0], grammar.next_states[1, 0] = 1, 0
    grammar.mask_ids[0], grammar.mask_ids[1] = 0, 1
    grammar.masks[0], grammar.masks[1] = 0x55555555, ~0x55555555
