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
from fusedstep.kernels.rank import rank_kernel
from fusedstep.kernels.rows import prepare_kernel
from fusedstep.kernels.sample import BUCKET, sample_kernel
from fusedstep.kernels.truncate import truncate_kernel
from fusedstep.ops.check import (
    check_logits,
    check_num_reqs,
    check_round,
    check_rows,
    check_state,
)
from fusedstep.ops.launch import Launch, Truncation
from fusedstep.ops.types import (
    BatchNeeds,
    GrammarState,
    RequestState,
    SamplingState,
    StepState,
    StopState,
    WindowRows,
)

# Token ids per program of the two launches, of a small and of a large batch: with few rows, many
# small programs keep the GPU busy.
SAMPLE_BLOCKS = (1024, 2048)
TRUNCATE_BLOCKS = (4096, 16384)
CONSTRAIN_BLOCK = 4096
MANY_PROGRAMS = 512
CANDIDATES = 1024


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


class _Scratch(NamedTuple):
    """Scratch memory of a row; ``fusedstep/kernels/winner.py`` says what orders its accesses.

    Entries per split or candidate: written by every program of a row, read by the last to arrive.
    Entries per row: written by the last program of the first launch, read by the second launch.
    """

    arrivals: torch.Tensor  # [R] int32, zero between launches
    best_scores: torch.Tensor  # [R, NUM_SPLITS] float32, of each split's winner in greedy rows
    best_tokens: torch.Tensor  # [R, NUM_SPLITS] int32
    others_best: torch.Tensor  # [R, NUM_SPLITS] float32, near score of the best of the others
    split_max: torch.Tensor  # [R, NUM_SPLITS] float32, of each split's raw logits
    split_weights: torch.Tensor  # [R, NUM_SPLITS] float32, sum(exp(raw logit - split_max))
    weights: torch.Tensor  # [R, NUM_SPLITS] float32
    weights_up_to: torch.Tensor  # [R, NUM_SPLITS] float32
    bucket_max: torch.Tensor  # [R, BUCKETS] float32
    row_max: torch.Tensor  # [R] float32
    floors: torch.Tensor  # [R] float32, what min-p keeps
    bounds: torch.Tensor  # [R] float32, of the candidates
    winners: torch.Tensor  # [R] int32
    winner_values: torch.Tensor  # [R] float32
    num_candidates: torch.Tensor  # [R] int32
    candidates: torch.Tensor  # [R, CANDIDATES] int32
    candidate_values: torch.Tensor  # [R, CANDIDATES] float32
    sorted: torch.Tensor  # [R, CANDIDATES] int32
    sorted_values: torch.Tensor  # [R, CANDIDATES] float32
    adjusted: torch.Tensor  # [R, V] float32, rows with bias, penalties or bad words, or handed over
    sampled_logits: torch.Tensor  # [R] float32, raw, of the sampled tokens; NaN of rows at rest
    limit_k: torch.Tensor  # [R] int32, of rows that are handed over, else V
    limit_p: torch.Tensor  # [R] float32, the same, else 1


class TritonStep:
    """``prepare``, then ``step`` once per decode step, on bound state. See ``NativeStep``."""

    def __init__(
        self,
        state: StepState,
        scratch: _Scratch | None = None,  # made before: of ``allocate_scratch``
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
        self._rows: dict[int, tuple[WindowRows, Any, _Strides]] = {}

    @staticmethod
    def allocate_scratch(max_num_reqs: int, vocab_size: int, device: torch.device) -> _Scratch:
        """Working memory: mostly one float32 for each token id of each row."""
        return _allocate_scratch(max_num_reqs, vocab_size, device)

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
        block = min(CONSTRAIN_BLOCK, max(_power_of_two(self._vocab_size), 32))
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
        block = _block_size(self._vocab_size, num_reqs, SAMPLE_BLOCKS)
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
            "SPLITS": _power_of_two(num_splits),
            "BLOCK_SIZES": self._block_sizes,
        }
        # A warp's share of what is done once per program is less where it has more tokens.
        few_warps = 4 if block == max(SAMPLE_BLOCKS) else 8
        hands_over = needs.truncation and self._truncation is not None
        features = {
            "BUCKETS": _num_buckets(self._vocab_size),
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
        part = _block_size(self._vocab_size, num_reqs, TRUNCATE_BLOCKS)
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


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` >= 1."""
    return 1 << (n - 1).bit_length()


def _block_size(vocab_size: int, num_reqs: int, sizes: tuple[int, int]) -> int:
    """Token ids per program: the small size while the batch would have few programs."""
    small, large = sizes
    few = -(-vocab_size // large) * num_reqs < MANY_PROGRAMS
    return max(min(small if few else large, _power_of_two(vocab_size)), int(BUCKET.value))


def _num_buckets(vocab_size: int) -> int:
    """Room for the buckets of either block size."""
    block = max(SAMPLE_BLOCKS)
    return _power_of_two(-(-vocab_size // block) * block // int(BUCKET.value))


def _allocate_scratch(max_num_reqs: int, vocab_size: int, device: torch.device) -> _Scratch:
    max_splits = -(-vocab_size // _block_size(vocab_size, 1, SAMPLE_BLOCKS))

    def floats(size: int) -> torch.Tensor:
        return torch.zeros(max_num_reqs, size, device=device)

    def ints(size: int) -> torch.Tensor:
        return torch.zeros(max_num_reqs, size, dtype=torch.int32, device=device)

    per_split = (
        "best_scores",
        "others_best",
        "split_max",
        "split_weights",
        "weights",
        "weights_up_to",
    )
    per_row = ("row_max", "floors", "bounds", "winner_values", "sampled_logits")
    return _Scratch(
        **{name: floats(max_splits) for name in per_split},
        **{name: floats(1) for name in per_row},
        **{name: ints(1) for name in ("arrivals", "winners", "num_candidates")},
        best_tokens=ints(max_splits),
        bucket_max=floats(_num_buckets(vocab_size)),
        candidates=ints(CANDIDATES),
        candidate_values=floats(CANDIDATES),
        sorted=ints(CANDIDATES),
        sorted_values=floats(CANDIDATES),
        adjusted=floats(vocab_size),
        limit_k=torch.full((max_num_reqs,), vocab_size, dtype=torch.int32, device=device),
        limit_p=torch.ones(max_num_reqs, device=device),
    )
