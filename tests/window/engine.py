"""A small torch model instead of vLLM, and requests that it decodes in windows."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from fusedstep.loop_forms import LoopForm
from fusedstep.ops.types import (
    FREE,
    BatchNeeds,
    GrammarState,
    RequestState,
    SamplingState,
    StepInputs,
    StepState,
    StopState,
)
from fusedstep.window.arrivals import NEVER_END
from fusedstep.window.graphs import GRAMMAR, VARIANTS, WindowGraphs
from fusedstep.window.loop import HOST_PACE, run_window
from fusedstep.window.state import Fetched, WindowState

VOCAB, BLOCK, MAX_LEN, ROWS = 97, 4, 64, 5
EOS = 11
FORMS = tuple(form for form in LoopForm if form.is_recorded)
PROMPTS = [[5, 9, 2], [1], [40, 41, 42, 43, 44], [7] * 9, [3, 1, 4, 1, 5, 9, 2, 6]]
MAX_TOKENS = [30, 45, 1, 60, 17]


def next_token(tokens):
    """The model: any function of the whole sequence."""
    return sum((i + 1) * (t + 3) for i, t in enumerate(tokens)) % VOCAB


class PagedModel:
    """Keeps the input ids in a paged cache and reads them back through the block tables.

    Device work alone, at the same addresses in every step: it can be recorded.
    """

    def __init__(self, inputs):
        self.inputs = inputs
        self.cache = torch.full((ROWS * MAX_LEN + 1,), -1)  # the last place is nobody's
        self.positions = torch.arange(MAX_LEN)
        self.row = torch.arange(ROWS)[:, None]
        self.vocabulary = torch.arange(VOCAB)
        self.begun = self.planned = self.forwards = self.ended = 0

    def begin(self, num_reqs):
        self.num_reqs = num_reqs
        self.begun += 1

    def plan(self):
        self.planned += 1

    def forward(self):
        self.forwards += 1
        n, inputs = self.num_reqs, self.inputs
        slots = inputs.slot_mappings[0, :n]
        nowhere = torch.full_like(slots, ROWS * MAX_LEN)
        self.cache.index_copy_(
            0, torch.where(slots < 0, nowhere, slots), inputs.input_ids[:n].long()
        )
        blocks = inputs.input_block_tables[0][self.row[:n], self.positions // BLOCK]
        tokens = self.cache[blocks * BLOCK + self.positions % BLOCK]
        summands = (self.positions + 1) * (tokens + 3)
        known = self.positions < inputs.seq_lens[:n, None]
        token = torch.where(known, summands, 0).sum(1) % VOCAB
        return (token[:, None] == self.vocabulary).float()

    def end(self):
        self.ended += 1

    @contextmanager
    def capturing(self, num_reqs, num_loras):
        self.num_reqs = num_reqs
        yield

    def begin_captured(self, num_reqs):
        self.num_reqs = None  # what is recorded must not look


class Engine:
    """Requests that have been prefilled, in rows of their own, and windows over them."""

    def __init__(self, step_class, prompts, max_tokens, device):
        def int32(*shape):
            return torch.zeros(shape, dtype=torch.int32)

        self.requests = RequestState(
            last_sampled_tokens=torch.zeros(ROWS, 1, dtype=torch.int64),
            num_computed_tokens=int32(ROWS),
            total_len=int32(ROWS),
            prompt_len=int32(ROWS),
            all_token_ids=int32(ROWS, MAX_LEN),
            prompt_bin_mask=int32(ROWS, -(-VOCAB // 32)),
            output_bin_counts=int32(ROWS, VOCAB),
            stopped=torch.zeros(ROWS, dtype=torch.bool),
        )
        stop = StopState(int32(ROWS), int32(ROWS) + 1, int32(ROWS, 2) + EOS)
        blocks = torch.randperm(ROWS * MAX_LEN // BLOCK).view(ROWS, -1).int()
        self.inputs = StepInputs(
            input_ids=int32(ROWS),
            positions=torch.zeros(ROWS, dtype=torch.int64),
            seq_lens=int32(ROWS),
            slot_mappings=torch.zeros(1, ROWS, dtype=torch.int64),
            input_block_tables=(torch.zeros_like(blocks),),
            block_sizes=(BLOCK,),
            sliding_reach=(0,),
        )
        self.state = StepState(
            requests=self.requests,
            sampling=SamplingState.off(ROWS, VOCAB, width=2),
            stop=stop,
            inputs=self.inputs,
            block_tables=(blocks,),
            num_blocks=int32(1, ROWS) + blocks.shape[1],
            grammar=remainders(),
        )
        self.has_grammars = False
        self.ops = step_class(self.state)
        self.model = PagedModel(self.inputs)
        self.windows = WindowState.allocate(ROWS, 16, device)
        self.outputs = [[] for _ in prompts]
        self.reads_late = False  # a window only when the next one is under way, as vLLM does
        self.unread = None
        for row, prompt in enumerate(prompts):
            positions = torch.arange(len(prompt) - 1)
            slots = blocks[row, positions // BLOCK] * BLOCK + positions % BLOCK
            self.model.cache[slots.long()] = torch.tensor(prompt[:-1], dtype=torch.int64)
            self.requests.last_sampled_tokens[row] = prompt[-1]
            self.requests.num_computed_tokens[row] = len(prompt) - 1
            self.requests.total_len[row] = len(prompt)
            self.requests.all_token_ids[row, : len(prompt)] = torch.tensor(prompt).int()
            stop.max_len[row] = min(len(prompt) + max_tokens[row], MAX_LEN)

    def constrain(self):
        """Every request begins in the first state of ``remainders``."""
        self.state.grammar.states.zero_()
        self.has_grammars = True

    def window(
        self,
        budget,
        cut_short=lambda: False,
        pace=HOST_PACE,
        graphs=None,
        rows=None,
        num_rows=None,
        logprobs=True,
        arrivals_seen=NEVER_END,
        num_stops=0,
        num_loras=0,
        sampled_logprobs=False,
    ):
        """One window over ``rows`` (all), budgets by row; returns the steps that gave tokens."""
        slot = self.windows.next_slot()
        rows = np.arange(len(budget)) if rows is None else np.asarray(rows)
        needs = replace(BatchNeeds.none(), logprobs=sampled_logprobs, grammar=self.has_grammars)
        budget = np.asarray(budget, dtype=np.int32)
        asked = 1 if logprobs else 0 if sampled_logprobs else -1
        slot.stage(rows, budget, asked, needs, num_rows, arrivals_seen, num_stops, num_loras)
        run_window(
            self.model, self.ops, slot, cut_short, pace, graphs, top_one if logprobs else None
        )
        stream = torch.cuda.Stream() if slot.rows.active.is_cuda else None
        fetched = Fetched(slot, stream)
        if self.reads_late:
            self.read()
            self.unread = fetched, rows, logprobs
            return None
        result = self.take(fetched, rows, logprobs)
        self.steps_enqueued, self.result = slot.steps_run, result
        return result.num_steps

    def take(self, fetched, rows, logprobs):
        """A window's tokens to the outputs of its requests."""
        result = fetched.tokens()
        for row, new in zip(rows, result.token_ids, strict=True):
            self.outputs[row] += new
        if logprobs:
            assert result.logprob_token_ids.shape == (sum(map(len, result.token_ids)), 2)
            assert result.logprob_token_ids[:, 0].tolist() == list(chain(*result.token_ids))
            assert result.logprobs.shape == result.logprob_token_ids.shape
        return result

    def read(self):
        """The window that is still unread, if there is one."""
        if self.unread is not None:
            self.take(*self.unread)
        self.unread = None


def remainders():
    """A grammar of three states: in state s no token may come that leaves s when divided by 3; the
    next state is the remainder of s plus the token. A token's only byte is its id."""
    states, tokens = torch.arange(3), torch.arange(VOCAB)
    next_states = (states[:, None] + torch.arange(256)) % 3
    masks = torch.zeros(3, -(-VOCAB // 32) * 32, dtype=torch.int64)
    masks[:, :VOCAB] = (tokens % 3 != states[:, None]).long()
    packed = (masks.view(3, -1, 32) << torch.arange(32)).sum(-1)
    return GrammarState(
        states=torch.full((ROWS,), FREE, dtype=torch.int32),
        reasoning_ends=torch.full((ROWS, 2), -1, dtype=torch.int32),
        next_states=next_states.int(),
        mask_ids=states.int(),
        masks=packed.to(torch.int32),
        token_starts=torch.arange(VOCAB + 1, dtype=torch.int32),
        token_bytes=tokens.to(torch.uint8),
    )


def top_one(logits, slot):
    """Takes down the logprob of the sampled token and of the likeliest."""
    sampled = slot.rows.sampled[: len(logits)].clamp(min=0)
    ids = torch.stack([sampled, logits.argmax(-1)], dim=1)
    logprobs = logits.log_softmax(-1).gather(1, ids)
    slot.output.logprobs.take_down(slot.steps_run, ids, logprobs, torch.zeros_like(sampled))


def recorded(form, engine, recorder, sizes=(ROWS,), grammars=False):
    """The graphs of a form for batches of these sizes."""
    variants = (*VARIANTS, GRAMMAR) if grammars else VARIANTS
    graphs = WindowGraphs(LoopForm(form), engine.model, engine.ops, engine.windows, variants)
    for num_rows in sizes:
        graphs.record(recorder, num_rows)
    engine.model.begun = engine.model.forwards = 0
    return graphs


def emitted(grammars=False):
    """What the requests must emit."""
    return [decoded(*request, grammars) for request in zip(PROMPTS, MAX_TOKENS, strict=True)]


def decoded(prompt, max_tokens, grammars=False):
    """One token at a time, in plain Python."""
    tokens, state = list(prompt), 0
    while len(tokens) < min(len(prompt) + max_tokens, MAX_LEN):
        token = next_token(tokens)
        if grammars and token % 3 == state:  # the likeliest of the others: the first
            token = int(state == 0)
        state = (state + token) % 3
        tokens.append(token)
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]
