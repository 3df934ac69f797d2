"""Stock's step, which ours is timed against, gives our tokens and leaves our state behind.

On the CPU, where native code stands in for Model Runner V2's Triton kernels; its sequence and its
arguments are those of a GPU. All cases run in one process, because vLLM's platform is per process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fusedstep.bench.kernels.step import CASES
from fusedstep.vllm_plugin.launch import wiring

# Prints {case/dtype/turn: {name: number of different elements}}, and what is_tie says.
CHILD = """
import dataclasses, json, logging, os
import torch
from fusedstep.bench.kernels import step as kernels
logging.getLogger("vllm").setLevel("ERROR")
from fusedstep.bench.kernels import stock_step
from fusedstep.vllm_plugin.cpu.platform import OracleCpuPlatform
OracleCpuPlatform.register_triton_kernel_overrides()

VOCAB, BATCH, STEPS, CPU = 1000, 3, 40, torch.device("cpu")

def pairs(stock, state):
    mine, theirs, penalties = state.requests, stock.requests, stock.sampler.penalties_state
    return {
        "num_computed_tokens": (mine.num_computed_tokens, theirs.num_computed_tokens.gpu),
        "total_len": (mine.total_len, theirs.total_len.gpu),
        "last_sampled_tokens": (mine.last_sampled_tokens, theirs.last_sampled_tokens),
        "all_token_ids": (
            mine.all_token_ids[:, : mine.total_len[0]],
            theirs.all_token_ids.gpu[:, : mine.total_len[0]],
        ),
        "input_ids": (state.inputs.input_ids, stock.buffers.input_ids),
        "positions": (state.inputs.positions, stock.buffers.positions),
        "seq_lens": (state.inputs.seq_lens, stock.buffers.seq_lens),
        "slot_mappings": (state.inputs.slot_mappings, stock.block_tables.slot_mappings),
        "block_tables": (
            state.inputs.input_block_tables[0],
            stock.block_tables.input_block_tables[0],
        ),
    } | ({
        "prompt_bin_mask": (mine.prompt_bin_mask, penalties.prompt_bin_mask),
        "output_bin_counts": (mine.output_bin_counts, penalties.output_bin_counts),
    } if penalties.use_penalty.any() else {})

found = {}
for case in kernels.CASES:
    for dtype in (torch.bfloat16, torch.float32):
        state = kernels.build_state(case.params, BATCH, VOCAB, STEPS, CPU)
        ours = kernels.FusedStep("native", state, case.needs)
        stock = stock_step.StockStep(*state.for_stock(), case.params)
        plan = kernels.Plan(CPU, (case,), (BATCH,), VOCAB, dtype, 1)
        logits = kernels.make_logits(plan, BATCH, case.logits_std)[:STEPS]
        before = logits.clone()
        for turn in ("first", "again"):  # counts stay, so the second turn differs from the first
            agreement = kernels.compare(stock, ours, logits)
            differs = {name: int((a != b).sum()) for name, (a, b) in pairs(stock, state).items()}
            found[f"{case.name}/{dtype}/{turn}"] = {
                **dataclasses.asdict(agreement),
                "logits": int((logits != before).sum()),
                "faster": stock.has_faster_sampler,
                "emitted": int(state.rows.num_sampled.sum()),
                **differs,
            }

def is_tie(temperature, tokens):
    # Four equal logits above all others; half of the probability keeps two of them.
    params = {"temperature": temperature, "top_p": 0.5}
    logits = torch.full((100,), -20.0)
    logits[[3, 5, 7, 9]] = 5.0
    state = kernels.build_state(params, 1, 100, 1, CPU)
    return stock_step.is_tie(logits, 0, 7, state.sampling, tokens)

ties = [is_tie(1.0, (3, 9)), is_tie(1.0, (5, 5)), is_tie(1.0, (3, 4)), is_tie(0.0, (3, 9))]

# Without seeds stock draws its own: a greedy row does not care.
case = kernels.pick_cases(("greedy",))[0]
state = kernels.build_state(case.params, BATCH, VOCAB, STEPS, CPU)
unseeded = stock_step.StockStep(*state.for_stock(), case.params, seeded=False)
agreement = kernels.compare(unseeded, kernels.FusedStep("native", state, case.needs), logits)
found |= {"ties": ties, "unseeded": dataclasses.asdict(agreement)}
print("RESULT" + json.dumps(found), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if not wiring.is_cpu_build():
        pytest.skip("vLLM's CUDA build has no CPU platform: test_bench_kernels compares there")
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=os.environ | {"FUSEDSTEP": "oracle", "VLLM_LOGGING_STREAM": "ext://sys.stderr"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    result = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    assert result is not None, done.stderr
    answers: dict[str, Any] = json.loads(result.removeprefix("RESULT"))
    return answers


@pytest.mark.parametrize("turn", ("first", "again"))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_same_tokens_and_state(found: dict[str, Any], case: str, dtype: str, turn: str) -> None:
    answer = found[f"{case}/torch.{dtype}/{turn}"]
    assert answer.pop("num_compared") == answer.pop("emitted") == 3 * 22
    assert not any(answer.values()), answer


def test_equal_logits_at_the_cut_are_a_tie(found: dict[str, Any]) -> None:
    assert found["ties"] == [True, True, False, False]


def test_stock_without_seeds(found: dict[str, Any]) -> None:
    assert found["unseeded"] == {"num_compared": 66, "num_tied": 0, "num_different": 0}
