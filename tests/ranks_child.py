"""Two data-parallel engines of a mixture of experts, and requests for either of them.

    python ranks_child.py '{"switch": "on", "model": ..., "decode_steps": [2, "auto"], ...}'

Writes one JSON object to ``result``: per run the tokens of each request, the counts of each rank.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

SECONDS = 30  # for one run that must not end, or ends with other tokens
GREEDY: dict[str, Any] = {"temperature": 0.0}
# Rank, prompt, sampling parameters, and the number of tokens of request 0 at which it comes.
REQUESTS: list[tuple[int, list[int], dict[str, Any], int]] = [
    (0, [5, 9, 200, 7], GREEDY | {"max_tokens": 90}, 0),
    (0, [77] * 9, {"temperature": 0.9, "seed": 3, "max_tokens": 50}, 0),
    (0, [3, 1, 4, 1, 5], GREEDY | {"max_tokens": 33}, 0),
    # Rank 1 has joined by dummy batches until here.
    (1, [8, 30] * 20, {"temperature": 1.2, "seed": 4, "logprobs": 2, "max_tokens": 20}, 20),
    (1, [600, 700, 800], GREEDY | {"stop_token_ids": list(range(200, 300)), "max_tokens": 60}, 30),
    (0, [12, 13], GREEDY | {"max_tokens": 11}, 40),
    (1, [21, 22, 23], {"temperature": 0.7, "seed": 5, "max_tokens": 80}, 75),  # rank 0 ends first
    (0, [40, 41], GREEDY | {"max_tokens": 150}, 10),
]
ABORT = {7: 6}  # request -> aborted after so many of its tokens


async def run(engine: Any) -> list[list[int]]:
    """The tokens of every request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    tokens: list[list[int]] = [[] for _ in REQUESTS]
    grown = asyncio.Condition()

    async def one(number: int) -> None:
        rank, prompt, fields, comes_at = REQUESTS[number]
        async with grown:
            await grown.wait_for(lambda: len(tokens[0]) >= comes_at)
        streams = number == 0 or number in ABORT
        kind = RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY
        params = SamplingParams(
            output_kind=kind, detokenize=False, **{"ignore_eos": True, **fields}
        )
        outputs = engine.generate(
            {"prompt_token_ids": prompt}, params, f"{number}", data_parallel_rank=rank
        )
        async for output in outputs:
            async with grown:
                tokens[number] += output.outputs[0].token_ids
                grown.notify_all()
            if number in ABORT and len(tokens[number]) >= ABORT[number]:
                await engine.abort(f"{number}")
                tokens[number] = tokens[number][: ABORT[number]]
                return

    await asyncio.gather(*map(one, range(len(REQUESTS))))
    return tokens


async def of_ranks(engine: Any, method: str, *args: Any) -> list[Any]:
    """Calls a method of the engine core of each rank."""
    client = engine.engine_core
    calls = [client._call_utility_async(method, *args, engine=core) for core in client.core_engines]
    return list(await asyncio.gather(*calls))


async def talk(ask: dict[str, Any]) -> dict[str, Any]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    options: dict[str, Any] = {
        "model": ask["model"],
        "enforce_eager": True,
        "dtype": "float32",
        "data_parallel_size": 2,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 26,
        "skip_tokenizer_init": True,
    }
    fused = ask["switch"] == "on"
    if fused:
        from fusedstep.options import Options
        from fusedstep.vllm_plugin.launch import wiring

        parsed = Options.parse({})
        wiring.switch_on(parsed)
        options = wiring.engine_options(parsed, options)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
    result: dict[str, Any] = {"tokens": [], "counts": [], "broken": None}
    try:
        for steps in ask["decode_steps"]:
            if fused:
                await of_ranks(engine, "test_decode_steps", steps)
            before = await of_ranks(engine, "test_counts")
            result["tokens"].append(await asyncio.wait_for(run(engine), 10 * SECONDS))
            result["counts"].append([before, await of_ranks(engine, "test_counts")])
        if ask.get("fault"):
            await of_ranks(engine, "test_fault", ask["fault"])
            try:
                result["broken"] = await asyncio.wait_for(run(engine), SECONDS)
            except Exception as error:
                result["broken"] = repr(error)
    finally:
        engine.shutdown()
    return result


def register() -> None:
    """A general plug-in of vLLM's: what tests ask engine cores and workers for."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.gpu_worker import Worker

    EngineCore.test_decode_steps = decode_steps
    EngineCore.test_counts = counts
    EngineCore.test_fault = lambda core, name: core.collective_rpc("test_fault", args=(name,))
    Worker.test_fault = fault


def decode_steps(core: Any, value: object) -> None:
    from fusedstep.policy import DecodeSteps

    core.scheduler.decode_steps = DecodeSteps.parse(value)


def counts(core: Any) -> dict[str, Any]:
    """The scheduler's, and under "worker" the worker's."""
    if not hasattr(core.scheduler, "counts"):
        return {}
    (of_worker,) = core.collective_rpc("window_stats")
    return core.scheduler.counts.as_dict() | {"worker": of_worker}


def fault(worker: Any, name: str) -> None:
    """The worker does not keep to the agreement any more."""
    ranks = worker.model_runner.ranks
    agree = ranks.agree
    assert name == "own K"
    ranks.agree = lambda n, steps: agree(n, steps)._replace(
        **({"num_steps": steps} if steps < 100 else {})
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    os.environ |= {
        "FUSEDSTEP": asked["switch"],
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    Path(asked["result"]).write_text(json.dumps(asyncio.run(talk(asked))))
