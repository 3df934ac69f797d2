"""Inside the child process of ``engine_child``: many engines, one after the other.

vLLM's import takes longer than a tiny model's engine. Both children, stock and fusedstep, run the
same functions, so that a test compares two answers to one call.
"""

from __future__ import annotations

import gc
import os
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import engine_child
from engine_child import EngineChild, completion, scheduler

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # of 32: vLLM's CPU attention knows no less
    "num_key_value_heads": 1,
    "vocab_size": 49152,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # so wide that a wrong key shows
    "tie_word_embeddings": False,  # tied, a random model repeats itself
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
OPTIONS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 24,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}

OPEN: tuple[str, dict[str, Any], Any] = ("", {}, None)  # model, options, LLM


class FeatureChild(EngineChild):
    """A child that has no engine yet. ``switch`` is FUSEDSTEP's value."""

    def __init__(self, switch: str) -> None:
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), start, (switch,))


def start(switch: str) -> None:
    os.environ |= {
        "FUSEDSTEP": switch,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


def ready() -> None:
    """Answers when the child has started."""


@dataclass(frozen=True)
class Ask:
    """One request; ``at`` is the engine step before which it comes."""

    prompt: Any
    fields: dict[str, Any]
    at: int = 0
    priority: int = 0
    lora: str | None = None


def use(model: str, options: dict[str, Any]) -> Any:
    """The LLM with these options; the one before, if another, is shut down."""
    global OPEN
    given = options
    if OPEN[:2] == (model, options):
        return OPEN[2]
    OPEN = ("", {}, None)
    if engine_child.ENGINE is not None:
        engine_child.ENGINE.engine_core.shutdown()
        engine_child.ENGINE = None
    if os.environ["FUSEDSTEP"] == "on":
        from fusedstep import LLM
    else:
        from vllm import LLM
    gc.collect()
    gc.freeze()  # else vLLM's start looks at all that was imported, seven times
    if "kv_events_config" in options:
        from vllm.config import KVEventsConfig

        options = options | {"kv_events_config": KVEventsConfig(**options["kv_events_config"])}
    llm = LLM(model, enforce_eager=True, **{"dtype": "float32"} | options)
    engine_child.ENGINE = llm.llm_engine
    OPEN = model, given, llm
    return llm


def ask(
    model: str, options: dict[str, Any], asks: list[Ask], reset_at: int | None = None
) -> dict[str, Any]:
    """All requests to their end: completions, the order in which they ended, counts.

    Before step ``reset_at`` all running requests lose their KV cache.
    """
    use(model, options)
    engine_child.reset_prefix_cache()
    before = counts()
    events = watch_kv_events()
    engine = engine_child.ENGINE
    waiting = dict(enumerate(asks))
    answers: dict[int, Any] = {}
    ended: list[int] = []
    preemptions: dict[str, int] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        if step == reset_at:
            engine.reset_prefix_cache(reset_running_requests=True)
        for number in [n for n, one in waiting.items() if one.at <= step]:
            one = waiting.pop(number)
            engine.add_request(
                str(number),
                one.prompt,
                sampling_params(one.fields),
                priority=one.priority,
                lora_request=lora_request(one.lora),
            )
        for output in engine.step():
            number = int(output.request_id)
            answers[number] = [completion(c) for c in output.outputs]
            if output.finished:
                ended.append(number)
        preemptions |= {r.request_id: r.num_preemptions for r in scheduler().requests.values()}
        step += 1
        assert step < 2000, (sorted(waiting), ended)
    return {
        "answers": [answers[n] for n in range(len(asks))],
        "ended": ended,
        "preemptions": sum(preemptions.values()),
        "stored": stored_blocks(events),
        "counts": since(before),
    }


def ask_with_own_state(
    model: str, options: dict[str, Any], asks: list[Ask], look_at_it: bool
) -> dict[str, Any]:
    """``ask`` a Llama whose own ModelState gives its forward an input in every step.

    Without ``look_at_it`` the runner does not ask for the state, and runs windows.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class ShiftState(DefaultModelState):
        def prepare_inputs(self, *args: Any) -> dict[str, Any]:
            return super().prepare_inputs(*args) | {"shift": 5}

    class ShiftedLlama(LlamaForCausalLM):
        def forward(self, input_ids: Any, *args: Any, shift: int = 0, **kwargs: Any) -> Any:
            input_ids = (input_ids + shift) % self.config.vocab_size
            return super().forward(input_ids, *args, **kwargs)

        @staticmethod
        def get_model_state_cls() -> type:
            return ShiftState

    ModelRegistry.register_model("ShiftedLlama", ShiftedLlama)
    options = options | {"hf_overrides": {"architectures": ["ShiftedLlama"]}}
    if look_at_it:
        use(model, options)
    else:
        with patch("fusedstep.vllm_plugin.runner.runner.runner_reason", lambda runner: None):
            use(model, options)
    result = ask(model, options, asks)
    return result | {"scheduler": scheduler().engine_reason}


def stream(
    model: str, options: dict[str, Any], pieces: list[list[int]], max_tokens: int, together: bool
) -> dict[str, Any]:
    """One request whose input comes in pieces, beside a plain one.

    A piece comes when the answer to the piece before has ended; with ``together`` all come while
    the first is answered. Returns the tokens of the answers, and how each ended.
    """
    from vllm.sampling_params import RequestOutputKind

    use(model, options)
    engine_child.reset_prefix_cache()
    before = counts()
    engine = engine_child.ENGINE
    fields = {
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "output_kind": RequestOutputKind.DELTA,
    }

    def request(token_ids: list[int], resumable: bool) -> Any:
        made = engine.input_processor.process_inputs(
            internal,
            {"prompt_token_ids": token_ids},
            sampling_params(fields),
            engine.get_supported_tasks(),
            resumable=resumable,
        )
        made.external_req_id = "streamed"
        return made

    def send(token_ids: list[int] | None) -> None:
        made = request(token_ids or [0], token_ids is not None)
        engine.output_processor.add_request(made, None, None, 0)
        engine.engine_core.add_request(deepcopy(made))  # as if sent to another process

    internal = "streamed-0"
    engine.add_request("plain", "Once upon a time", sampling_params(fields | {"max_tokens": 150}))
    left: list[list[int] | None] = [*pieces, None]
    send(left.pop(0))
    tokens: list[int] = []
    plain: list[int] = []
    ended: list[str] = []
    for _ in range(2000):
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            taken = output.outputs[0].token_ids
            (tokens if output.request_id == "streamed" else plain).extend(taken)
            if output.request_id == "streamed" and output.outputs[0].finish_reason:
                ended.append(output.outputs[0].finish_reason)
        while left and ((together and tokens) or len(ended) == len(pieces) - len(left) + 1):
            send(left.pop(0))
    assert not left and not engine.has_unfinished_requests(), (len(tokens), len(plain), left)
    return {"tokens": tokens, "plain": plain, "ended": ended, "counts": since(before)}


def resubmit(
    model: str, options: dict[str, Any], decode_steps: object, prompts: list[str]
) -> list[list[int]]:
    """The answers to the prompts, which all have one id: while a request decodes it is aborted,
    and the next takes its id at once. Only the last goes on to its end."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind

    use(model, options)
    engine_child.set_decode_steps(decode_steps)
    engine = engine_child.ENGINE
    fields = {"max_tokens": 40, "ignore_eos": True, "output_kind": RequestOutputKind.CUMULATIVE}
    answers: list[list[int]] = []
    with patch.dict(os.environ, VLLM_DISABLE_REQUEST_ID_RANDOMIZATION="1"):
        for prompt in prompts:
            if answers:
                engine.abort_request(["again"])
            engine.add_request("again", prompt, sampling_params(fields))
            try:
                engine.add_request("again", prompt, sampling_params(fields))
            except VLLMValidationError as error:
                assert "in use" in str(error)
            answers.append([])
            while engine.has_unfinished_requests():
                for output in engine.step():
                    answers[-1] = list(output.outputs[0].token_ids)
                if len(answers) < len(prompts) and len(answers[-1]) > 3 * len(answers):
                    break
    engine_child.set_decode_steps("auto")
    return answers


def beam_search(
    model: str, options: dict[str, Any], prompts: list[str], width: int, max_tokens: int
) -> dict[str, Any]:
    """Per prompt the tokens and the score of every beam."""
    from vllm.sampling_params import BeamSearchParams

    llm = use(model, options)
    before = counts()
    params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.beam_search([{"prompt": prompt} for prompt in prompts], params)
    return {
        "beams": [[(beam.tokens, beam.cum_logprob) for beam in o.sequences] for o in outputs],
        "counts": since(before),
    }


def chat(
    model: str, options: dict[str, Any], messages: Any, tools: Any, fields: dict[str, Any]
) -> dict[str, Any]:
    """The text that answers a conversation."""
    llm = use(model, options)
    before = counts()
    [output] = llm.chat(messages, sampling_params(fields), tools=tools, use_tqdm=False)
    return {"text": output.outputs[0].text, "counts": since(before)}


def embed(model: str, options: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
    llm = use(model, options)
    before = counts()
    outputs = llm.embed(prompts, use_tqdm=False)
    return {"vectors": [o.outputs.embedding for o in outputs], "counts": since(before)}


def refusal(model: str, options: dict[str, Any]) -> str:
    """What vLLM says to options that it does not take; "" if it takes them."""
    try:
        use(model, options)
    except Exception as error:
        engine_child.ENGINE = None
        return str(error)
    return ""


def sampling_params(fields: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    fields = {"output_kind": RequestOutputKind.FINAL_ONLY, "temperature": 0.0} | fields
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    return SamplingParams(**fields)


def without_adapters() -> Any:
    """Windows whose rows have none."""
    from fusedstep.vllm_plugin.runner.adapters import Adapters

    def stage(adapters: Adapters, rows: Any, num_tokens: int = 1) -> None:
        of_rows, of_tokens = (0,) * len(rows), (0,) * len(rows) * num_tokens
        adapters._set = partial(adapters.runner._set_active_loras, of_rows, of_tokens, set())

    return patch.object(Adapters, "stage", stage)


def ask_without_adapters(model: str, options: dict[str, Any], asks: list[Ask]) -> dict[str, Any]:
    with without_adapters():
        return ask(model, options, asks)


def ask_without_processing(model: str, options: dict[str, Any], asks: list[Ask]) -> dict[str, Any]:
    """``ask`` with windows that leave out what our own kernels do not do."""
    from fusedstep.vllm_plugin.runner.processing import Processing

    use(model, options)
    with patch.object(Processing, "is_wanted", lambda *_: False):
        return ask(model, options, asks)


def lora_request(folder: str | None) -> Any:
    """The adapter in this folder; its number is the last digit of the name."""
    if folder is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(folder, int(folder[-1]), folder)


def watch_kv_events() -> list[Any]:
    """What this engine publishes from now on, if it does."""
    events: list[Any] = []
    if scheduler().kv_events_config is not None:
        scheduler().kv_event_publisher.publish = lambda batch: events.extend(batch.events)
    return events


def stored_blocks(events: list[Any]) -> list[tuple[int, ...]]:
    """The tokens of all blocks stored, one entry each."""
    blocks = []
    for event in events:
        if type(event).__name__ == "BlockStored":
            size, token_ids = event.block_size, event.token_ids
            blocks += [tuple(token_ids[i : i + size]) for i in range(0, len(token_ids), size)]
    return sorted(blocks)


def counts() -> dict[str, Any]:
    """The windows of fusedstep; nothing in stock's process."""
    if os.environ["FUSEDSTEP"] != "on":
        return {}
    return engine_child.window_stats()


def since(before: dict[str, Any]) -> dict[str, Any]:
    after = counts()
    if not after:
        return {}
    stock = {
        reason: number - before["stock_steps"].get(reason, 0)
        for reason, number in after["stock_steps"].items()
    }
    return {
        "windows": after["windows"] - before["windows"],
        "steps": after["steps"] - before["steps"],
        "stock_steps": {reason: number for reason, number in stock.items() if number},
    }


def serve(model: str, options: dict[str, Any], prompts: list[str], length: int) -> dict[str, Any]:
    """An AsyncLLM, its engine and workers in processes of their own, that is paused and resumed."""
    import asyncio

    from vllm import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    if engine_child.ENGINE is not None:
        engine_child.ENGINE.engine_core.shutdown()
        engine_child.ENGINE = None
    options = {"model": model, "enforce_eager": True, "dtype": "float32", **options}
    if os.environ["FUSEDSTEP"] == "on":
        from fusedstep.options import Options
        from fusedstep.vllm_plugin.launch import wiring

        options = wiring.engine_options(Options.parse({}), options)
    fields = {
        "max_tokens": length,
        "ignore_eos": True,
        "output_kind": RequestOutputKind.DELTA,
    }
    seen: dict[str, Any] = {}

    async def talk() -> None:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
        try:
            for mode in ("keep", "wait", "abort"):
                seen[mode] = await paused(engine, mode)
            ranks = range(options.get("data_parallel_size", 1))
            seen["ranks"] = await asyncio.gather(
                *(whole(engine, f"rank-{r}-{n}", prompts[n], r) for r in ranks for n in (0, 1, 2))
            )
            seen["counts"] = (await engine.collective_rpc("window_stats"))[0]
        finally:
            engine.shutdown()

    async def whole(engine: Any, name: str, prompt: str, rank: int | None = None) -> list[int]:
        tokens: list[int] = []
        await take(engine, name, prompt, tokens, rank)
        return tokens

    async def take(
        engine: Any, name: str, prompt: str, tokens: list[int], rank: int | None = None
    ) -> str | None:
        """Asks again while it is told to: vLLM 0.33 rejects requests while it is paused."""
        reason = None
        params = sampling_params(fields)
        while reason is None:
            try:
                async for output in engine.generate(prompt, params, name, data_parallel_rank=rank):
                    tokens.extend(output.outputs[0].token_ids)
                    reason = output.outputs[0].finish_reason
            except Exception as error:
                if "Please retry after it resumes" not in str(error):
                    raise
                await asyncio.sleep(0.1)
        return reason

    async def paused(engine: Any, mode: str) -> dict[str, Any]:
        """Pause when some tokens of two requests are there; a third comes during the pause."""
        tokens: list[list[int]] = [[], [], []]
        tasks = [
            asyncio.create_task(take(engine, f"{mode}-{n}", prompts[n], tokens[n])) for n in (0, 1)
        ]
        while min(len(tokens[0]), len(tokens[1])) < 5:
            await asyncio.sleep(0.002)
        await engine.pause_generation(mode=mode, clear_cache=mode != "keep")
        was_paused = await engine.is_paused()
        late = asyncio.create_task(take(engine, f"{mode}-2", prompts[2], tokens[2]))
        await asyncio.sleep(0.2)
        during = [len(taken) for taken in tokens]
        await asyncio.sleep(0.3)
        still = [len(taken) for taken in tokens]
        await engine.resume_generation()
        reasons = await asyncio.gather(*tasks, late)
        return {
            "was_paused": was_paused,
            "is_paused": await engine.is_paused(),
            "during": during,
            "still": still,
            "tokens": tokens,
            "reasons": reasons,
        }

    # Else vLLM 0.33 gives each rank a memory node of its own, also where there is only one.
    nodes = {"VLLM_CPU_SIM_MULTI_NUMA": "0"}
    with patch.dict(os.environ, {"VLLM_CPU_OMP_THREADS_BIND": "0|1", **nodes}):
        asyncio.run(talk())
    return seen
