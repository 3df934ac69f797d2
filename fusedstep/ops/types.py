"""The tensors that the step operations read and write; their addresses are static.

Two index spaces: ``req_state_idx`` is a request's permanent row in the device state, ``batch_idx``
its row in this window's batch. ``R`` is max_num_reqs, ``V`` the vocabulary size, ``B`` the batch.
Each class says who writes it; nobody else does.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch

# A tensor of one dtype: the only place that says so.
Bool = Annotated[torch.Tensor, torch.bool]
Int32 = Annotated[torch.Tensor, torch.int32]
Int64 = Annotated[torch.Tensor, torch.int64]
Float32 = Annotated[torch.Tensor, torch.float32]
UInt8 = Annotated[torch.Tensor, torch.uint8]

# A row that stopped writes its key and value nowhere.
PAD_SLOT_ID = -1
# In the place of blocks below a sliding window: they may be somebody else's by now, with a NaN.
NULL_BLOCK_ID = 0
# Off-value of top-k: the size of the vocabulary.
ALL_TOKENS = -1
# A request's state in its grammar, where that is no state of the tables: any token may come (there
# is no grammar, or it has ended); the tables end here, the host must say what may come. From
# REASONS down it reasons, and any token may come: after the end of its reasoning it is in state
# REASONS - state.
FREE, OUTSIDE, REASONS = -1, -2, -3


class Parameter(NamedTuple):
    """A sampling parameter: its value where a request does not ask for it, and what it needs."""

    off: float = 0.0
    on: float | None = None  # a value with an effect, for requests that are made up
    need: str | None = None  # the field of BatchNeeds that a value other than ``off`` requires
    width: int | None = None  # columns of a table, as vLLM allocates it by default


def dtypes(state_class: type) -> dict[str, torch.dtype]:
    """The dtype of each tensor of one of the classes below, by the name of its field."""
    hints = get_type_hints(state_class, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if is_tensor(hint)}


def is_tensor(hint: Any) -> bool:
    """Does this annotation of a field stand for one tensor?"""
    return getattr(hint, "__origin__", None) is torch.Tensor


@dataclass(frozen=True)
class RequestState:
    """Progress of every request, row = req_state_idx.

    Written by the runner when a request enters its row and by prefill steps, and by ``step``
    inside a window.
    """

    last_sampled_tokens: Int64  # [R, 1]
    num_computed_tokens: Int32  # [R]
    total_len: Int32  # [R], prompt plus output tokens
    prompt_len: Int32  # [R]
    all_token_ids: Int32  # [R, max_model_len]
    prompt_bin_mask: Int32  # [R, ceil(V / 32)], one bit per token id
    output_bin_counts: Int32  # [R, V]
    stopped: Bool  # [R], set by ``step`` and ``follow``, cleared when a request enters the row


@dataclass(frozen=True)
class SamplingState:
    """Sampling parameters of every request, row = req_state_idx. Written by the runner.

    Names, shapes and meaning are those of vLLM's model runner V2 (``v1/worker/gpu/sample``): [R],
    or [R, width] for tables, of which the ``num_`` field beside it says how much a row uses.
    """

    temperature: Annotated[Float32, Parameter()]  # 0: greedy
    seeds: Annotated[Int64, Parameter()]
    top_k: Annotated[Int32, Parameter(off=ALL_TOKENS, need="truncation")]
    top_p: Annotated[Float32, Parameter(off=1.0, on=0.9, need="truncation")]
    min_p: Annotated[Float32, Parameter(on=0.01, need="min_p")]
    repetition_penalty: Annotated[Float32, Parameter(off=1.0, on=1.1, need="adjustment")]
    frequency_penalty: Annotated[Float32, Parameter(need="adjustment")]
    presence_penalty: Annotated[Float32, Parameter(need="adjustment")]
    num_allowed_token_ids: Annotated[Int32, Parameter(need="adjustment")]  # 0: all are allowed
    allowed_token_ids: Annotated[Int32, Parameter(width=1024)]
    num_logit_bias: Annotated[Int32, Parameter(need="adjustment")]
    logit_bias_token_ids: Annotated[Int32, Parameter(width=1024)]
    logit_bias: Annotated[Float32, Parameter(width=1024)]
    min_lens: Annotated[Int32, Parameter()]  # prompt_len + min_tokens
    num_min_stop_token_ids: Annotated[Int32, Parameter(need="adjustment")]
    min_stop_token_ids: Annotated[Int32, Parameter(width=128)]  # masked while shorter than min_lens
    num_bad_words: Annotated[Int32, Parameter(need="adjustment")]
    bad_word_token_ids: Annotated[Int32, Parameter(width=100)]  # flattened
    bad_word_offsets: Annotated[Int32, Parameter(width=11)]

    @staticmethod
    def parameters() -> dict[str, Parameter]:
        """By the name of the field."""
        hints = get_type_hints(SamplingState, include_extras=True)
        return {name: hint.__metadata__[1] for name, hint in hints.items()}

    @classmethod
    def off(
        cls, num_rows: int, vocab_size: int, device: Any = None, width: int | None = None
    ) -> SamplingState:
        """Greedy requests that ask for nothing; ``width``: columns of all tables."""
        tensors = {}
        for name, spec in cls.parameters().items():
            shape = (num_rows,) if spec.width is None else (num_rows, width or spec.width)
            value = off_value(spec, vocab_size)
            tensors[name] = torch.full(shape, value, dtype=dtypes(cls)[name], device=device)
        return cls(**tensors)


def off_value(spec: Parameter, vocab_size: int) -> float:
    return vocab_size if spec.off == ALL_TOKENS else spec.off


@dataclass(frozen=True)
class StopState:
    """Stop rule of every request, row = req_state_idx. Written by the runner.

    The rule is vLLM's ``check_stop``: the sampled token is in ``stop_token_ids`` (the EOS id is
    one of them unless ignore_eos), or ``total_len`` has reached ``max_len``.
    """

    max_len: Int32  # [R], min(prompt_len + max_tokens, max_model_len)
    num_stop_token_ids: Int32  # [R]
    stop_token_ids: Int32  # [R, MAX_STOP_TOKEN_IDS]


@dataclass(frozen=True)
class StepInputs:
    """Inputs of the model and the attention in the next step, by batch_idx.

    Written by ``prepare`` for a window's first step and by ``step`` for the others. An inactive row
    writes its key and value to no slot (PAD_SLOT_ID); a padding row has position and length 0.
    """

    input_ids: Int32  # [max_num_tokens]
    positions: Int64  # [max_num_tokens]
    seq_lens: Int32  # [R]
    slot_mappings: Int64  # [num_kv_cache_groups, max_num_tokens]
    input_block_tables: tuple[torch.Tensor, ...]  # per group [R, max_num_blocks] int32
    block_sizes: tuple[int, ...]  # per group, tokens
    # Per group with a sliding window: the tokens before a row's next one that it may attend; else 0
    sliding_reach: tuple[int, ...]

    def num_below(self, group: int, position: int) -> int:
        """Blocks of a row at ``position`` that lie wholly below its sliding window."""
        reach = self.sliding_reach[group]
        return max(position - reach, 0) // self.block_sizes[group] if reach else 0


class RowTokens(NamedTuple):
    """The tokens of each row that a forward reads: ``width`` of them, from the last one that was
    sampled on, or ``back[b]`` before it, or ``ahead`` of it.

    Behind it come the first ``num_drafts`` of ``drafts[b]``, then 0. Positions and lengths end at
    max_model_len.
    """

    width: int
    drafts: torch.Tensor  # [num_reqs or more, d] int64
    num_drafts: int
    back: torch.Tensor | None = None  # [num_reqs] int32; None: 0
    ahead: int = 0


@dataclass(frozen=True)
class TokenInputs:
    """Inputs of a forward with several tokens of each row, by batch_idx. Written by ``place``.

    Row b's tokens are those from ``b * width`` on. An inactive row writes to no slot.
    """

    input_ids: Int32  # [max_num_tokens]
    positions: Int64  # [max_num_tokens]
    seq_lens: Int32  # [R]
    slot_mappings: Int64  # [num_kv_cache_groups, max_num_tokens]
    last_sampled: Int64  # [R], where among the tokens the one is that was sampled last

    @classmethod
    def allocate(
        cls, max_num_reqs: int, max_num_tokens: int, num_groups: int, device: Any = None
    ) -> TokenInputs:
        """Static tensors, all zero."""
        shapes: dict[str, tuple[int, ...]] = {
            "seq_lens": (max_num_reqs,),
            "last_sampled": (max_num_reqs,),
            "slot_mappings": (num_groups, max_num_tokens),
        }
        return cls(
            **{
                name: torch.zeros(shapes.get(name, (max_num_tokens,)), dtype=dtype, device=device)
                for name, dtype in dtypes(cls).items()
            }
        )


@dataclass(frozen=True)
class GrammarState:
    """Structured output: the grammars in use as automata of bytes, and where each request is.

    ``states`` is written by the runner when a request enters its row, and by ``follow``; the rest
    by the runner when a grammar comes. ``S`` states and ``M`` masks, of all grammars together.
    """

    states: Int32  # [R], row = req_state_idx: a state, or FREE, OUTSIDE, REASONS - state
    # [R, 2], -1: none. The token that ends a request's reasoning, and one that ends it as the first
    # of the grammar's, which leads outside.
    reasoning_ends: Int32
    next_states: Int32  # [S, 256], by byte: a state, FREE or OUTSIDE
    mask_ids: Int32  # [S], row of masks
    masks: Int32  # [M, ceil(V / 32)], one bit per token id: may it come?
    token_starts: Int32  # [V + 1], of each token's bytes; one without any ends a grammar
    token_bytes: UInt8  # [room], of all tokens


@dataclass(frozen=True)
class StepState:
    """All that a step is bound to, once: what outlives a window."""

    requests: RequestState
    sampling: SamplingState
    stop: StopState
    inputs: StepInputs
    block_tables: tuple[torch.Tensor, ...]  # per group [R, max_num_blocks] int32
    num_blocks: torch.Tensor  # [num_kv_cache_groups, R] int32
    grammar: GrammarState | None = field(default=None, kw_only=True)


_BY_STEP = ("out_tokens", "out_logprobs", "out_ranks")


@dataclass(frozen=True)
class WindowRows:
    """One window's batch, by batch_idx.

    ``idx_mapping``, ``steps_allowed`` and ``stop_weight`` are staged by the host, the rest is
    written by ``prepare`` and ``step``.
    """

    idx_mapping: Int64  # [B], batch_idx -> req_state_idx, -1 for a padding row
    steps_allowed: Int32  # [B], of this row: its reserved KV slots
    active: Bool  # [B]
    sampled: Int64  # [B], this step's token of each active row; with grammars -1 of the others
    logprobs: Float32  # [B], its log softmax in the raw logits, when asked
    ranks: Int64  # [B], how many raw logits are at least its own, when asked
    num_sampled: Int32  # [B], tokens emitted in this window
    out_tokens: Int64  # [max_num_steps, B], [step, batch_idx]
    out_logprobs: Float32  # [max_num_steps, B], of them, kept by the loop when asked
    out_ranks: Int64  # [max_num_steps, B], the same
    stop_weight: Int32  # [1], staged: what a stop takes off num_active, at <= 0 the window ends
    num_active: Int32  # [1], less the weight of each stop: the window ends at <= 0

    @classmethod
    def allocate(cls, max_num_reqs: int, max_steps: int, device: Any = None) -> WindowRows:
        """Static tensors, all zero but for ``stop_weight``."""
        shapes: dict[str, tuple[int, ...]] = {"stop_weight": (1,), "num_active": (1,)}
        shapes |= dict.fromkeys(_BY_STEP, (max_steps, max_num_reqs))
        tensors = {
            name: torch.zeros(shapes.get(name, (max_num_reqs,)), dtype=dtype, device=device)
            for name, dtype in dtypes(cls).items()
        }
        tensors["stop_weight"].fill_(1)
        return cls(**tensors)

    def keep_logprobs(self, num_reqs: int) -> None:
        """After a step: what it said of each row's token, in the place of its step.

        A row without a token keeps what it had: neither its count nor its values have changed.
        """
        step = (self.num_sampled[:num_reqs] - 1).clamp_(min=0).long()[None]
        self.out_logprobs[:, :num_reqs].scatter_(0, step, self.logprobs[None, :num_reqs])
        self.out_ranks[:, :num_reqs].scatter_(0, step, self.ranks[None, :num_reqs])


@dataclass(frozen=True)
class BatchNeeds:
    """Work that the rows of a batch may ask of a step; known when the window is staged.

    A kernel leaves out what nobody asks for. Too much costs time, too little gives wrong tokens.
    """

    adjustment: bool = True  # bias, allowed ids, min_tokens, penalties or bad words
    min_p: bool = True  # at a temperature above 0
    truncation: bool = True  # top-k or top-p at a temperature above 0
    logprobs: bool = False  # logprob and rank of the sampled tokens
    grammar: bool = False  # structured output

    @property
    def restriction(self) -> bool:
        """Some tokens are left out of the draw."""
        return self.min_p or self.truncation

    def covers(self, other: BatchNeeds) -> bool:
        """Does it do all that ``other`` asks for?"""
        both = zip(astuple(self), astuple(other), strict=True)
        return all(does or not asked for does, asked in both)

    @classmethod
    def none(cls) -> BatchNeeds:
        """Temperature and seeds alone."""
        return cls(adjustment=False, min_p=False, truncation=False)

    @classmethod
    def beside_drafts(cls) -> BatchNeeds:
        """All that vLLM takes in a request whose tokens are drafted."""
        return cls(min_p=False)
