"""Inside the child process of ``engine_child``: what an RL framework does with an engine."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any
from unittest.mock import patch

import engine_child
from features_child import counts, sampling_params, since, use

# An engine of its own, whose windows are long though its requests stream, on a slow machine, too;
# but not so long that two of them run past what happens in between. In a process of its own it is
# slowed down, or on a busy machine a client that wants to meddle would come when all is over.
EXTENSION = {
    "worker_extension_cls": "rollout_child.Policy",
    "additional_config": {"fusedstep": {"window_latency_ms": 10_000, "decode_steps": 16}},
}
LENGTH = 230
PACE_SECONDS = 0.2  # per turn
FIELDS = {"max_tokens": LENGTH, "ignore_eos": True}


class Policy:
    """vLLM adds this to its worker."""

    model_runner: Any
    reload_weights: Any

    def load(self, folder: str) -> dict[str, int]:
        """Load other weights; how many tokens of each request the old ones gave, where the worker
        knows: Model Runner V2."""
        states = getattr(self.model_runner, "req_states", None)
        given = {}
        for request_id, row in {} if states is None else states.req_id_to_index.items():
            computed = int(states.num_computed_tokens.gpu[row]) - int(states.prompt_len.np[row])
            given[request_id.rpartition("-")[0]] = computed + 1
        self.reload_weights(weights_path=folder)
        return given

    def pace(self, seconds: float) -> None:
        """From now on each turn takes so much longer."""
        execute = self.model_runner.execute_model

        def slowly(*args: Any, **fields: Any) -> Any:
            time.sleep(seconds)
            return execute(*args, **fields)

        self.model_runner.execute_model = slowly


def update(
    model: str,
    options: dict[str, Any],
    prompts: list[str],
    updates: list[tuple[int, str]],
    lags: tuple[int, ...] = (0, 0, 0),
) -> dict[str, Any]:
    """The answers to the prompts, of weights that change while they are given.

    A prompt comes after as many steps as its lag. ``updates``: tokens of the first answer that the
    engine has delivered before it gets the weights of a folder.
    """
    use(model, options | EXTENSION)
    engine = engine_child.ENGINE
    engine.collective_rpc("load", args=(model,))
    engine_child.reset_prefix_cache()
    before = counts()
    tokens: list[list[int]] = [[] for _ in prompts]
    given: list[dict[str, int]] = []
    left, waiting, step = list(updates), dict(enumerate(prompts)), 0
    params = sampling_params(FIELDS | {"output_kind": _delta()})
    while waiting or engine.has_unfinished_requests():
        for number in [n for n in waiting if lags[n] <= step]:
            engine.add_request(str(number), waiting.pop(number), params)
        if left and len(tokens[0]) >= left[0][0]:
            [told] = engine.collective_rpc("load", args=(left.pop(0)[1],))
            given.append(told or {str(n): len(each) for n, each in enumerate(tokens)})
        for output in engine.step():
            tokens[int(output.request_id)].extend(output.outputs[0].token_ids)
        step += 1
    assert not left
    return {"tokens": tokens, "given": given, "counts": since(before)}


def _delta() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.DELTA


def serve(model: str, options: dict[str, Any], prompts: list[str], other: str) -> dict[str, Any]:
    """An AsyncLLM, its engine and its worker in processes of their own, in each of the stages."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from fusedstep.options import Options
    from fusedstep.vllm_plugin.launch import wiring

    if engine_child.ENGINE is not None:
        engine_child.ENGINE.engine_core.shutdown()
        engine_child.ENGINE = None
    given = {"model": model, "enforce_eager": True, "dtype": "float32", **options, **EXTENSION}
    given |= {"distributed_executor_backend": "mp"}
    given = wiring.engine_options(Options.parse({}), given)

    async def talk() -> dict[str, Any]:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**given))
        try:
            await engine.collective_rpc("pace", args=(PACE_SECONDS,))
            talker = Talker(engine, prompts)
            return {
                "update": await talker.update(model, other),
                "reset": await talker.reset(),
                "sleep": await talker.sleep(),
                "abort": await talker.abort(),
                "counts": (await engine.collective_rpc("window_stats"))[0],
            }
        finally:
            engine.shutdown()

    with patch.dict(os.environ, {"VLLM_CPU_OMP_THREADS_BIND": "0"}):
        return asyncio.run(talk())


class Talker:
    """Three requests at a time, and something that happens while they decode."""

    def __init__(self, engine: Any, prompts: list[str]) -> None:
        self.engine, self.prompts = engine, prompts

    async def take(self, name: str, prompt: str, tokens: Any, **fields: Any) -> list[str | None]:
        """Stream a request's tokens into ``tokens``, by sample; returns how each ended."""
        ended: dict[int, str | None] = {}
        params = sampling_params(FIELDS | {"output_kind": _delta()} | fields)
        async for output in self.engine.generate(prompt, params, name):
            for one in output.outputs:
                tokens[one.index].extend(one.token_ids)
                ended[one.index] = one.finish_reason
        return [ended.get(n) for n in range(len(tokens))]

    def start(self) -> tuple[list[Any], list[asyncio.Task[Any]]]:
        tokens: list[list[list[int]]] = [[[]] for _ in self.prompts]
        tasks = [
            asyncio.create_task(self.take(str(n), prompt, tokens[n]))
            for n, prompt in enumerate(self.prompts)
        ]
        return tokens, tasks

    async def update(self, model: str, other: str) -> dict[str, Any]:
        tokens, tasks = self.start()
        given = []
        for number, folder in ((5, other), (30, model)):
            await reach(number, [sample for request in tokens for sample in request])
            [told] = await self.engine.collective_rpc("load", args=(folder,))
            given.append(told)
        await asyncio.gather(*tasks)
        assert await self.engine.reset_prefix_cache()  # it holds what other weights left
        return {"tokens": [request[0] for request in tokens], "given": given}

    async def reset(self) -> dict[str, Any]:
        """What running requests hold stays, unless they are to lose it, too."""
        tokens, tasks = self.start()
        await reach(5, [sample for request in tokens for sample in request])
        kept = await self.engine.reset_prefix_cache()
        await reach(30, [sample for request in tokens for sample in request])
        lost = await self.engine.reset_prefix_cache(reset_running_requests=True)
        await asyncio.gather(*tasks)
        return {"tokens": [request[0] for request in tokens], "was_reset": [kept, lost]}

    async def sleep(self) -> dict[str, Any]:
        tokens, tasks = self.start()
        await reach(5, [sample for request in tokens for sample in request])
        await self.engine.sleep(level=1, mode="keep")
        asleep = [await self.engine.is_sleeping()]
        await asyncio.sleep(0.1)
        seen = [len(request[0]) for request in tokens]
        await asyncio.sleep(0.2)
        still = [len(request[0]) for request in tokens]
        await self.engine.wake_up()
        asleep.append(await self.engine.is_sleeping())
        await asyncio.gather(*tasks)
        samples = [request[0] for request in tokens]
        return {"tokens": samples, "asleep": asleep, "seen": seen, "still": still}

    async def abort(self) -> dict[str, Any]:
        """A group of samples is aborted beside a request that goes on."""
        group = {"n": 3, "temperature": 1.0, "seed": 11}
        whole: list[list[int]] = [[], [], []]
        await self.take("whole", self.prompts[1], whole, **group)
        part: list[list[int]] = [[], [], []]
        beside: list[list[int]] = [[]]
        task = asyncio.create_task(self.take("part", self.prompts[1], part, **group))
        other = asyncio.create_task(self.take("beside", self.prompts[0], beside))
        await reach(5, part + beside)
        await self.engine.abort("part")
        reasons = await task
        await other
        all_free = await self.engine.reset_prefix_cache()
        return {
            "whole": whole,
            "part": part,
            "reasons": reasons,
            "beside": beside[0],
            "all_free": all_free,
        }


async def reach(number: int, samples: list[list[int]]) -> None:
    """Wait until every sample has so many tokens."""
    while min(map(len, samples)) < number:
        await asyncio.sleep(0.002)


def roll_out(model: str, options: dict[str, Any], repeat: int, **plan: Any) -> tuple[Any, Any, Any]:
    """One run of ``bench rollout``: what its engine tells, its counts after and before."""
    from fusedstep.bench.engine import EngineServer
    from fusedstep.bench.rollout import Plan

    server = EngineServer()
    server.llm = use(model, options)
    server.kind = "fusedstep" if os.environ["FUSEDSTEP"] == "on" else "stock"
    prompts, params = Plan(**plan).requests(repeat, server.vocab_size())
    before = server.window_counts()
    told = server.roll_out(prompts=prompts, params=params)
    return told, server.window_counts(), before
