"""The step operations as Triton kernels, none of which synchronises.

A decode step is one launch, with logprobs one more. With top-k or top-p it is two, or one before
and one after somebody else's truncation (``Truncation``): seeded tokens equal stock vLLM's only
where both keep the same tokens, and on a GPU those are known to nobody but stock's own kernels.

``TritonStep`` binds the state once: the tensors have static addresses, as a captured CUDA graph
needs them. On CPU tensors the kernels run in Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch

from fusedstep.kernels.accept import accept_kernel
from fusedstep.kernels.draw import draw_kernel
from fusedstep.kernels.grammar import constrain_kernel, follow_kernel
from fusedstep.kernels.place import place_kernel
from fusedstep.kernels.rank import rank_kernel
from fusedstep.kernels.rows import prepare_kernel
from fusedstep.kernels.sample import sample_kernel
from fusedstep.kernels.truncate import truncate_kernel
from fusedstep.ops.check import (
    check_logits,
    check_num_reqs,
    check_place,
    check_round,
    check_rows,
    check_state,
    check_token_inputs,
)
from fusedstep.ops.launch import Launch, Truncation
from fusedstep.ops.triton_scratch import (
    CANDIDATES,
    SAMPLE_BLOCKS,
    TRUNCATE_BLOCKS,
    Scratch,
    allocate_scratch,
    block_size,
    num_buckets,
    power_of_two,
)
from fusedstep.ops.types import (
    BatchNeeds,
    GrammarState,
    RequestState,
    RowTokens,
    SamplingState,
    StepState,
    StopState,
    TokenInputs,
    WindowRows,
)

CONSTRAIN_BLOCK = 4096


def _arguments(state_class: type, *left_out: str) -> Any:
    names = [field.name for field in fields(state_class) if field.name not in left_out]
    return namedtuple(state_class.__name__, names)


# What a kernel takes for each class of tensors: named tuples with the fields of the class. Those
# left out are the loop's own.
_Requests = _arguments(RequestState)
_Sampling = _arguments(SamplingState)
_Stop = _arguments(StopState)
_Rows = _arguments(WindowRows, "out_logprobs", "out_ranks")
_Grammar = _arguments(GrammarState)
_Tokens = _arguments(TokenInputs)


class _Inputs(NamedTuple):
    """StepInputs without sizes, which are constants of the kernels."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    slot_mappings: torch.Tensor
    input_block_tables: tuple[torch.Tensor, ...]


class _Strides(NamedTuple):
    """Row strides of the state's matrices, in elements."""

    all_token_ids: int
    prompt_bin_mask: int
    output_bin_counts: int
    allowed_token_ids: int
    logit_bias: int
    min_stop_token_ids: int
    bad_word_token_ids: int
    bad_word_offsets: int
    stop_token_ids: int
    slot_mappings: int
    block_tables: tuple[int, ...]
    out_tokens: int


class TritonStep:
    """``prepare``, then ``step`` once per decode step, on bound state. See ``NativeStep``."""

    def __init__(
        self,
        state: StepState,
        scratch: Scratch | None = None,  # made before: of ``allocate_scratch``
        truncation: Truncation | None = None,  # None: ours, which keeps what a sort would
    ) -> None:
        self._truncation = truncation
        self._device = state.requests.output_bin_counts.device
        check_state(state, self._device)
        requests, sampling, stop, inputs = state.requests, state.sampling, state.stop, state.inputs
        self._max_num_reqs, self._vocab_size = requests.output_bin_counts.shape
        self._requests = _of(_Requests, requests)
        self._sampling = _of(_Sampling, sampling)
        self._stop = _of(_Stop, stop)
        self._inputs = _of(_Inputs, inputs)
        self._grammar = state.grammar and _of(_Grammar, state.grammar)
        self._block_sizes = inputs.block_sizes
        self._sliding_reach = inputs.sliding_reach
        self._block_tables = state.block_tables
        self._num_blocks = state.num_blocks
        self._strides = _Strides(
            all_token_ids=requests.all_token_ids.stride(0),
            prompt_bin_mask=requests.prompt_bin_mask.stride(0),
            output_bin_counts=requests.output_bin_counts.stride(0),
            allowed_token_ids=sampling.allowed_token_ids.stride(0),
            logit_bias=sampling.logit_bias.stride(0),
            min_stop_token_ids=sampling.min_stop_token_ids.stride(0),
            bad_word_token_ids=sampling.bad_word_token_ids.stride(0),
            bad_word_offsets=sampling.bad_word_offsets.stride(0),
            stop_token_ids=stop.stop_token_ids.stride(0),
            slot_mappings=inputs.slot_mappings.stride(0),
            block_tables=tuple(table.stride(0) for table in state.block_tables),
            out_tokens=0,
        )
        if scratch is None:
            scratch = self.allocate_scratch(self._max_num_reqs, self._vocab_size, self._device)
        self._scratch = scratch
        self._max_model_len = requests.all_token_ids.shape[1]
        self._rows: dict[int, tuple[WindowRows, Any, _Strides]] = {}
        self._placed: dict[int, tuple[TokenInputs, Any]] = {}

    @staticmethod
    def allocate_scratch(max_num_reqs: int, vocab_size: int, device: torch.device) -> Scratch:
        """Working memory: mostly one float32 for each token id of each row."""
        return allocate_scratch(max_num_reqs, vocab_size, device)

    def prepare(self, rows: WindowRows, num_reqs: int) -> None:
        """Start a window of ``num_reqs`` rows; ``idx_mapping`` and ``steps_allowed`` are staged."""
        for launch in self.prepare_launches(rows, num_reqs):
            launch()

    def step(
        self,
        logits: torch.Tensor,  # [num_reqs, V] bfloat16, float16 or float32, any row stride
        rows: WindowRows,
        num_reqs: int,
        needs: BatchNeeds,
    ) -> None:
        """``sample``, then emit the tokens, apply the stop rule and place the next inputs."""
        if needs.grammar:
            self.constrain(logits, rows, num_reqs)
        for launch in self.launches(logits, rows, num_reqs, needs, advance=True):
            launch()
        if needs.grammar:
            for launch in self.follow_launches(rows, num_reqs, ends_rows=True):
                launch()

    def sample(
        self, logits: torch.Tensor, rows: WindowRows, num_reqs: int, needs: BatchNeeds
    ) -> None:
        """Write the token of each active row to ``rows.sampled``.

        ``logits`` is left as it is, but for what a grammar forbids.
        """
        if needs.grammar:
            self.constrain(logits, rows, num_reqs)
        for launch in self.launches(logits, rows, num_reqs, needs, advance=False):
            launch()

    def constrain(self, logits: torch.Tensor, rows: WindowRows, num_reqs: int) -> None:
        """Mask, in place, what the requests' grammars forbid. No row has sampled a token yet."""
        for launch in self.constrain_launches(logits, rows, num_reqs):
            launch()

    def follow(self, rows: WindowRows, num_reqs: int) -> None:
        """Move the request of each row that has sampled a token on in its grammar.

        One that gets outside of the tables takes no step of a window any more.
        """
        for launch in self.follow_launches(rows, num_reqs, ends_rows=False):
            launch()

    def accept(
        self, tokens: torch.Tensor, num_tokens: torch.Tensor, rows: WindowRows, num_reqs: int
    ) -> None:
        """Take the tokens of a speculative round: of row b the first ``num_tokens[b]``."""
        for launch in self.accept_launches(tokens, num_tokens, rows, num_reqs):
            launch()

    def accept_launches(
        self, tokens: torch.Tensor, num_tokens: torch.Tensor, rows: WindowRows, num_reqs: int
    ) -> Sequence[Launch]:
        """The kernel that ``accept`` launches; none for no rows."""
        check_round(tokens, num_tokens, num_reqs, self._device)
        arguments, strides = self._arguments_of(rows, num_reqs)
        args = {
            "tokens_ptr": tokens,
            "num_tokens_ptr": num_tokens,
            "width": tokens.shape[1],
            "rows": arguments,
            "requests": self._requests,
            "stop": self._stop,
            "strides": strides,
        }
        return (Launch(accept_kernel, (num_reqs,), args, {}, num_warps=1),) * (num_reqs > 0)

    def place(self, rows: WindowRows, num_reqs: int, out: TokenInputs, tokens: RowTokens) -> None:
        """Write these tokens of each row: those of a round's forward, or of its drafter's."""
        for launch in self.place_launches(rows, num_reqs, out, tokens):
            launch()

    def place_launches(
        self, rows: WindowRows, num_reqs: int, out: TokenInputs, tokens: RowTokens
    ) -> Sequence[Launch]:
        """The kernel that ``place`` launches."""
        check_place(out, tokens, num_reqs)
        arguments, strides = self._arguments_of(rows, num_reqs)
        known = self._placed.get(id(out))
        if known is None:
            check_token_inputs(out, self._device)
            known = self._placed[id(out)] = (out, _of(_Tokens, out))
        args = {
            "drafts_ptr": tokens.drafts,
            "drafts_stride": tokens.drafts.stride(0),
            "num_drafts": tokens.num_drafts,
            "back_ptr": tokens.back,
            "ahead": tokens.ahead,
            "num_reqs": num_reqs,
            "rows": arguments,
            "requests": self._requests,
            "inputs": self._inputs,
            "out": known[1],
            "max_num_reqs": len(out.seq_lens),
            "max_num_tokens": len(out.input_ids),
            "max_model_len": self._max_model_len,
            "slot_stride": out.slot_mappings.stride(0),
            "strides": strides,
        }
        constexprs = {
            "WIDTH": tokens.width,
            "TOKENS": power_of_two(tokens.width),
            "BLOCK_SIZES": self._block_sizes,
            "BLOCK": 1024,
        }
        return (Launch(place_kernel, (num_reqs + 1,), args, constexprs, num_warps=1),)

    def constrain_launches(
        self, logits: torch.Tensor, rows: WindowRows, num_reqs: int
    ) -> Sequence[Launch]:
        """The kernel that ``constrain`` launches; none for no rows."""
        check_logits(logits, num_reqs, self._vocab_size, self._device)
        arguments, _ = self._arguments_of(rows, num_reqs)
        args = {
            "logits_ptr": logits,
            "logits_stride": logits.stride(0),
            "rows": arguments,
            "grammar": self._grammar,
        }
        block = min(CONSTRAIN_BLOCK, max(power_of_two(self._vocab_size), 32))
        constexprs = {"VOCAB_SIZE": self._vocab_size, "BLOCK_V": block}
        grid = (-(-self._vocab_size // block), num_reqs)
        return (Launch(constrain_kernel, grid, args, constexprs, num_warps=4),) * (num_reqs > 0)

    def follow_launches(self, rows: WindowRows, num_reqs: int, ends_rows: bool) -> Sequence[Launch]:
        """The kernel that follows the grammars; with ``ends_rows``, in a window."""
        arguments, _ = self._arguments_of(rows, num_reqs)
        args = {
            "ends_rows": int(ends_rows),
            "slot_stride": self._strides.slot_mappings,
            "rows": arguments,
            "requests": self._requests,
            "inputs": self._inputs,
            "grammar": self._grammar,
        }
        constexprs = {"NUM_GROUPS": len(self._block_sizes)}
        return (Launch(follow_kernel, (num_reqs,), args, constexprs, num_warps=1),) * (num_reqs > 0)

    def prepare_launches(self, rows: WindowRows, num_reqs: int) -> Sequence[Launch]:
        """The kernel that ``prepare`` launches."""
        arguments, strides = self._arguments_of(rows, num_reqs)
        args = {
            "rows": arguments,
            "num_reqs": num_reqs,
            "requests": self._requests,
            "inputs": self._inputs,
            "block_tables": self._block_tables,
            "num_blocks": self._num_blocks,
            "max_num_reqs": self._max_num_reqs,
            "max_num_tokens": self._inputs.slot_mappings.shape[1],
            "strides": strides,
        }
        constexprs = {
            "BLOCK_SIZES": self._block_sizes,
            "SLIDING_REACH": self._sliding_reach,
            "BLOCK": 1024,
        }
        return (Launch(prepare_kernel, (num_reqs + 1,), args, constexprs, num_warps=4),)

    def launches(
        self,
        logits: torch.Tensor,
        rows: WindowRows,
        num_reqs: int,
        needs: BatchNeeds,
        advance: bool,
    ) -> Sequence[Callable[[], None]]:
        """All that ``step`` (``advance``) or ``sample`` launches: nothing for no rows."""
        check_logits(logits, num_reqs, self._vocab_size, self._device)
        if num_reqs == 0:
            return ()
        arguments, strides = self._arguments_of(rows, num_reqs)
        block = block_size(self._vocab_size, num_reqs, SAMPLE_BLOCKS)
        num_splits = -(-self._vocab_size // block)
        args = {
            "logits_ptr": logits,
            "logits_stride": logits.stride(0),
            "logprobs": int(needs.logprobs),
            "advances": int(advance),
            "rows": arguments,
            "requests": self._requests,
            "sampling": self._sampling,
            "stop": self._stop,
            "inputs": self._inputs,
            "scratch": self._scratch,
            "strides": strides,
        }
        shape = {
            "VOCAB_SIZE": self._vocab_size,
            "BLOCK_V": block,
            "NUM_SPLITS": num_splits,
            "SPLITS": power_of_two(num_splits),
            "BLOCK_SIZES": self._block_sizes,
        }
        # A warp's share of what is done once per program is less where it has more tokens.
        few_warps = 4 if block == max(SAMPLE_BLOCKS) else 8
        hands_over = needs.truncation and self._truncation is not None
        features = {
            "BUCKETS": num_buckets(self._vocab_size),
            "ADJUST": needs.adjustment,
            "RESTRICT": needs.restriction,
            "HANDS_OVER": hands_over,
        }
        sample = Launch(
            sample_kernel,
            (num_splits, num_reqs),
            args,
            shape | features,
            num_warps=8 if needs.adjustment or needs.restriction else few_warps,
            max_registers=80 if needs.adjustment else 64 if needs.restriction else None,
        )
        ranks: tuple[Launch, ...] = ()
        if needs.logprobs:
            names = ("logits_ptr", "logits_stride", "rows", "scratch")
            blocks = {name: shape[name] for name in ("VOCAB_SIZE", "BLOCK_V", "NUM_SPLITS")}
            read = {name: args[name] for name in names}
            grid = (num_splits, num_reqs)
            ranks = (Launch(rank_kernel, grid, read, blocks, num_warps=few_warps),)
        if not needs.truncation:
            return (sample, *ranks)
        if self._truncation is not None:
            scratch = self._scratch
            limited = (scratch.adjusted[:num_reqs], scratch.limit_k[:num_reqs])
            truncation = partial(self._truncation, *limited, scratch.limit_p[:num_reqs])
            draw = Launch(draw_kernel, (num_splits, num_reqs), args, shape, num_warps=few_warps)
            return (sample, truncation, draw, *ranks)
        part = block_size(self._vocab_size, num_reqs, TRUNCATE_BLOCKS)
        num_parts = -(-self._vocab_size // part)
        truncate = Launch(
            truncate_kernel,
            (num_parts, num_reqs),
            args | {"part_size": part, "num_parts": num_parts},
            shape | {"CANDIDATES": CANDIDATES},
            num_warps=16,
            max_registers=128,
        )
        return (sample, truncate, *ranks)

    def _arguments_of(self, rows: WindowRows, num_reqs: int) -> tuple[Any, _Strides]:
        """Kept for each WindowRows seen.

        A runner has two: the window's, which both slots share, and the prefill sampler's.
        """
        check_num_reqs(rows, num_reqs)
        known = self._rows.get(id(rows))
        if known is None:
            check_rows(rows, self._device)
            strides = self._strides._replace(out_tokens=rows.out_tokens.stride(0))
            known = self._rows[id(rows)] = (rows, _of(_Rows, rows), strides)
        return known[1], known[2]


def _of(tuple_class: Any, state: object) -> Any:
    return tuple_class(*(getattr(state, name) for name in tuple_class._fields))
