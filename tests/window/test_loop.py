"""The loop with a small torch model instead of vLLM: windows of any length give the same tokens."""

from dataclasses import fields
from importlib.util import find_spec
from itertools import chain

import numpy as np
import pytest
import torch

from fusedstep.ops.dispatch import load
from fusedstep.ops.types import BatchNeeds, RequestState, SamplingState, StepInputs, StopState
from fusedstep.window import output
from fusedstep.window.arrivals import ALL, ArrivalCounter
from fusedstep.window.loop import HOST_PACE, run_window
from fusedstep.window.pace import AheadPace
from fusedstep.window.state import WindowState

CPU = torch.device("cpu")
VOCAB, BLOCK, MAX_LEN, ROWS = 97, 4, 64, 5
EOS = 11


def pytest_generate_tests(metafunc):
    """Windows of any length run on all step operations of the device, the other tests on one."""
    if "step_ops" in metafunc.fixturenames:
        on_cpu = metafunc.config.getoption("--device") == "cpu"
        names = ["native", "reference"] * on_cpu + ["triton"] * bool(find_spec("triton"))
        metafunc.parametrize(
            "step_ops", names if "num_steps" in metafunc.fixturenames else names[:1]
        )


@pytest.fixture
def engine(step_ops, device):
    with torch.device(device):
        yield Engine(load(step_ops), PROMPTS, MAX_TOKENS, torch.device(device))


def next_token(tokens):
    """The model: any function of the whole sequence."""
    return sum((i + 1) * (t + 3) for i, t in enumerate(tokens)) % VOCAB


class PagedModel:
    """Keeps the input ids in a paged cache and reads them back through the block tables."""

    def __init__(self, inputs):
        self.inputs, self.cache = inputs, torch.full((ROWS * MAX_LEN,), -1)
        self.forwards = self.ended = 0

    def begin(self, num_reqs):
        self.num_reqs = num_reqs

    def forward(self):
        self.forwards += 1
        logits = torch.zeros(self.num_reqs, VOCAB)
        for row in range(self.num_reqs):
            slot = int(self.inputs.slot_mappings[0, row])
            if slot >= 0:
                self.cache[slot] = self.inputs.input_ids[row]
            positions = torch.arange(int(self.inputs.seq_lens[row]))
            blocks = self.inputs.input_block_tables[0][row, positions // BLOCK]
            tokens = self.cache[blocks * BLOCK + positions % BLOCK].tolist()
            logits[row, next_token(tokens)] = 1.0
        return logits

    def advance(self):
        pass

    def end(self):
        self.ended += 1


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
        )
        self.ops = step_class(
            self.requests,
            greedy_sampling(),
            stop,
            self.inputs,
            (blocks,),
            int32(1, ROWS) + blocks.shape[1],
        )
        self.model = PagedModel(self.inputs)
        self.windows = WindowState.allocate(ROWS, 16, device)
        self.outputs = [[] for _ in prompts]
        for row, prompt in enumerate(prompts):
            positions = torch.arange(len(prompt) - 1)
            slots = blocks[row, positions // BLOCK] * BLOCK + positions % BLOCK
            self.model.cache[slots.long()] = torch.tensor(prompt[:-1], dtype=torch.int64)
            self.requests.last_sampled_tokens[row] = prompt[-1]
            self.requests.num_computed_tokens[row] = len(prompt) - 1
            self.requests.total_len[row] = len(prompt)
            self.requests.all_token_ids[row, : len(prompt)] = torch.tensor(prompt).int()
            stop.max_len[row] = min(len(prompt) + max_tokens[row], MAX_LEN)

    def window(self, budget, cut_short=lambda: False, pace=HOST_PACE):
        """One window over all rows, budgets by row; returns the steps it ran."""
        slot = self.windows.next_slot()
        needs = BatchNeeds(adjustment=False, min_p=False, truncation=False, logprobs=True)
        slot.stage(np.arange(len(budget)), np.asarray(budget, dtype=np.int32), 1, needs)
        run_window(self.model, self.ops, slot, cut_short, pace)
        result = output.Fetched(slot).tokens()
        for tokens, new in zip(self.outputs, result.token_ids, strict=True):
            tokens += new
        assert result.logprob_token_ids.shape == (sum(map(len, result.token_ids)), 2)
        assert result.logprob_token_ids[:, 0].tolist() == list(chain(*result.token_ids))
        assert result.logprobs.shape == result.logprob_token_ids.shape
        return slot.steps_run


def greedy_sampling():
    tables = {"allowed_token_ids", "logit_bias_token_ids", "logit_bias", "min_stop_token_ids"}
    tables |= {"bad_word_token_ids", "bad_word_offsets"}
    floats = {f.name for f in fields(SamplingState) if "penalty" in f.name}
    floats |= {"temperature", "top_p", "min_p", "logit_bias"}
    state = {
        f.name: torch.zeros(
            (ROWS, 2) if f.name in tables else ROWS,
            dtype=torch.float32 if f.name in floats else torch.int32,
        )
        for f in fields(SamplingState)
    }
    state["seeds"] = torch.zeros(ROWS, dtype=torch.int64)
    state["repetition_penalty"] += 1
    state["top_p"] += 1
    state["top_k"] += VOCAB
    return SamplingState(**state)


def replay(prompt, max_tokens):
    """What a request must emit: one token at a time, in plain Python."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, MAX_LEN):
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


PROMPTS = [[5, 9, 2], [1], [40, 41, 42, 43, 44], [7] * 9, [3, 1, 4, 1, 5, 9, 2, 6]]
MAX_TOKENS = [30, 45, 1, 60, 17]


@pytest.mark.parametrize("num_steps", [1, 7])
def test_windows_of_any_length(engine, num_steps):
    for _ in range(-(-max(MAX_TOKENS) // num_steps)):
        engine.window([num_steps] * len(PROMPTS))
    assert engine.outputs == [replay(*r) for r in zip(PROMPTS, MAX_TOKENS, strict=True)]
    assert engine.window([num_steps] * len(PROMPTS)) == 0  # all have stopped: no forward
    assert engine.model.ended <= engine.model.forwards


def test_budgets_differ_by_row(engine):
    """A row whose budget ends early waits; its tokens go on in the next window."""
    for turn in range(40):
        engine.window([1 + (turn + row) % 5 for row in range(len(PROMPTS))])
    assert engine.outputs == [replay(*r) for r in zip(PROMPTS, MAX_TOKENS, strict=True)]


def test_an_arrival_ends_the_window_after_its_step(engine, tmp_path):
    counter = ArrivalCounter(f"test-{tmp_path.name}")
    counter.unlink()
    stock_forward, engine.model.forwards = engine.model.forward, 0

    def forward():  # a request arrives during the third step
        if engine.model.forwards == 2:
            counter.add()
        return stock_forward()

    engine.model.forward = forward
    budget = [16] * len(PROMPTS)
    assert engine.window(budget, lambda: counter.exceeds(0)) == 3
    assert engine.window(budget, lambda: counter.exceeds(0)) == 1  # queued: never none
    assert engine.window(budget, lambda: counter.exceeds(1)) == 16  # the scheduler has seen it
    for _ in range(5):
        engine.window(budget, lambda: counter.exceeds(ALL))
    assert engine.outputs == [replay(*r) for r in zip(PROMPTS, MAX_TOKENS, strict=True)]


class LateDevice:
    """Events of a device that finishes a step only when the host waits for it."""

    recorded = waited = 0

    def record(self):
        type(self).recorded += 1

    def synchronize(self):
        type(self).waited += 1


@pytest.mark.parametrize("ahead", [1, 2])
def test_the_host_runs_only_a_little_ahead(monkeypatch, ahead):
    """Rows that have stopped are noticed ``ahead`` steps late; those steps give nothing."""
    device = type("Device", (LateDevice,), {})
    monkeypatch.setattr(torch.cuda, "Event", device)
    pace = AheadPace(ahead)
    engine, in_step = (Engine(load("native"), PROMPTS, MAX_TOKENS, CPU) for _ in range(2))
    extra = [engine.window([16] * len(PROMPTS), pace=pace) for _ in range(4)]
    needed = [in_step.window([16] * len(PROMPTS)) for _ in range(4)]
    assert engine.outputs == in_step.outputs
    assert extra == [min(steps + ahead, 16) for steps in needed]
    assert device.waited == device.recorded - 4 * ahead > 0


def test_two_processes_share_the_counter(tmp_path):
    ours, theirs = (ArrivalCounter(f"test-{tmp_path.name}") for _ in range(2))
    ours.unlink()
    ours.add(3)
    assert theirs.count == 3 and theirs.exceeds(2) and not theirs.exceeds(3)
    assert not ours.path.exists()


def test_an_error_in_the_forward_leaves_the_window(engine):
    def forward():
        raise RuntimeError("device lost")

    engine.model.forward = forward
    with pytest.raises(RuntimeError, match="device lost"):
        engine.window([4] * len(PROMPTS))
    assert engine.model.ended == 1
