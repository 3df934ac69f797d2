"""A vLLM engine inside a spawned child process, driven step by step.

vLLM picks its platform once per process, so stock and fusedstep engines each get a child. In the
child everything is in one process (VLLM_ENABLE_V1_MULTIPROCESSING=0): the scheduler can be
reached, and requests can come and go between two given steps.
"""

import gc
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

ENGINE: Any = None


class EngineChild:
    """``call(function, ...)`` runs a function in the child: one of a module right in tests."""

    def __init__(self, switch: str, model: str, **options: Any) -> None:
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), start, (switch, model, options))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert "." not in function.__module__, "the child cannot import a test's own module"
        return self.pool.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        self.pool.shutdown()


def start(switch: str, model: str, options: dict[str, Any]) -> None:
    """Child: build the engine. ``switch`` is FUSEDSTEP's value, ``options`` go to LLM."""
    global ENGINE
    gc.disable()
    os.environ |= {
        "FUSEDSTEP": switch,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if switch == "on":
        from fusedstep.options import Options
        from fusedstep.vllm_plugin.launch import wiring

        wiring.switch_on(Options.parse({"ops": options.get("ops")}))  # before torch's Triton
        from fusedstep import LLM
    else:
        from vllm import LLM
    gc.freeze()  # else vLLM's start looks at all that was imported, seven times
    gc.enable()
    ENGINE = LLM(model, enforce_eager=True, dtype="float32", **options).llm_engine


def scheduler() -> Any:
    return ENGINE.engine_core.engine_core.scheduler


def set_decode_steps(value: object) -> None:
    from fusedstep.policy import DecodeSteps

    scheduler().decode_steps = DecodeSteps.parse(value)


def window_stats() -> dict[str, Any]:
    return ENGINE.collective_rpc("window_stats")[0]


def free_blocks() -> int:
    return scheduler().kv_cache_manager.block_pool.get_num_free_blocks()


def num_kv_cache_groups() -> int:
    return len(scheduler().kv_cache_config.kv_cache_groups)


def reset_prefix_cache() -> None:
    assert ENGINE.reset_prefix_cache()


def run(
    requests: list[tuple[Any, dict[str, Any]]],
    arrive: dict[int, int] | None = None,
    abort: dict[int, int] | None = None,
    most_steps: int | None = None,
) -> dict[str, Any]:
    """Run (prompt, sampling fields) pairs to their end.

    ``arrive``: request number -> engine step before which it is added (0 without an entry);
    ``abort``: request number -> number of its tokens after which it is aborted; ``most_steps``:
    requests whose tokens are lost never end. Returns the completions per request and how often a
    request was preempted.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    arrive, abort = arrive or {}, abort or {}
    outputs: dict[int, Any] = {}
    preempted: dict[str, int] = {}
    waiting = dict(
        sorted(((n, arrive.get(n, 0)) for n in range(len(requests))), key=lambda x: x[1])
    )
    step = 0
    while waiting or ENGINE.has_unfinished_requests():
        assert most_steps is None or step < most_steps, "too many steps"
        for number in [n for n, at in waiting.items() if at <= step]:
            prompt, fields = requests[number]
            streams = number in abort
            if "structured_outputs" in fields:
                structured = StructuredOutputsParams(**fields["structured_outputs"])
                fields = fields | {"structured_outputs": structured}
            kind = RequestOutputKind.CUMULATIVE if streams else RequestOutputKind.FINAL_ONLY
            params = SamplingParams(output_kind=kind, **fields)
            ENGINE.add_request(str(number), prompt, params)
            del waiting[number]
        for output in ENGINE.step():
            number = int(output.request_id)
            outputs[number] = output
            if number in abort and len(output.outputs[0].token_ids) >= abort[number]:
                ENGINE.abort_request([output.request_id])
        for request in [*scheduler().running, *scheduler().waiting]:
            preempted[request.request_id] = request.num_preemptions
        step += 1
    return {
        "completions": [
            [completion(c) for c in outputs[n].outputs] if n in outputs else []
            for n in range(len(requests))
        ],
        "prompt_logprobs": [
            logprobs(outputs[n].prompt_logprobs) if n in outputs else None
            for n in range(len(requests))
        ],
        "cached_tokens": [outputs[n].num_cached_tokens if n in outputs else 0 for n in outputs],
        "preemptions": sum(preempted.values()),
    }


def completion(output: Any) -> dict[str, Any]:
    """A CompletionOutput without vLLM's types."""
    return {
        "token_ids": list(output.token_ids),
        "text": output.text,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "logprobs": logprobs(output.logprobs),
        "drafts": drafts_of(getattr(output, "spec_decode_metrics", None)),
    }


def drafts_of(metrics: Any) -> Any:
    """vLLM's counts of a request, step by step: drafts, and how many held."""
    return None if metrics is None else (metrics.per_step_drafted, metrics.per_step_accepted)


def logprobs(steps: Any) -> list[dict[int, tuple[float, int]] | None] | None:
    """Per position: token id -> (logprob, rank); None where there is none."""
    return steps and [
        step and {token: (entry.logprob, entry.rank) for token, entry in step.items()}
        for step in steps
    ]


def assert_logprobs(have: Any, want: Any, name: str) -> None:
    """Of ``logprobs``: the same token ids and ranks; values may differ by rounding."""
    for ours, stock in zip(have or [], want or [], strict=True):
        ranks, want_ranks = ({t: r for t, (_, r) in (p or {}).items()} for p in (ours, stock))
        assert ranks == want_ranks, name
        for token in ranks:
            assert abs(ours[token][0] - stock[token][0]) < 1e-4, name


def runner() -> Any:
    return ENGINE.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def record_on_tapes(form: str) -> dict[str, Any]:
    """The runner gets graphs of this form, as if vLLM had captured batches of 1, 2 and 4 rows."""
    from contextlib import nullcontext
    from types import SimpleNamespace
    from unittest.mock import patch

    import torch
    from vllm.config.compilation import CUDAGraphMode
    from vllm.model_executor.layers.attention import attention
    from window.tape import TapeRecorder

    from fusedstep.loop_forms import LoopForm
    from fusedstep.vllm_plugin.runner import recording as forms

    class Manager:
        """vLLM's, for windows: its own decode graph is the model itself."""

        def dispatch(self, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
            if args:  # a stock step
                return stock.dispatch(num_reqs, num_tokens, *args, **kwargs)
            padded = 1 << (num_tokens - 1).bit_length()
            return SimpleNamespace(
                cg_mode=CUDAGraphMode.FULL,
                num_tokens=padded,
                num_active_loras=kwargs["num_active_loras"],
            )

        def run_fullgraph(self, graph: Any) -> Any:
            return us.model(**us.decode_model.inputs)

    us = runner()
    stock = getattr(us.cudagraph_manager, "stock", us.cudagraph_manager)
    recorder = TapeRecorder(us.arrivals)
    recorder.python_ops = {
        f"vllm::{name}": getattr(attention, name)
        for name in ("unified_attention_with_output", "unified_kv_cache_update")
    }
    chosen = forms.Form(LoopForm(form), "on tapes")
    with (
        patch.object(forms, "choose", lambda *_: chosen),
        patch.object(forms, "CudaRecorder", lambda *_: recorder),
        patch.object(forms, "graph_capture", lambda device: nullcontext()),
        patch.object(forms, "_free_bytes", lambda: 0),
        patch(
            "fusedstep.vllm_plugin.runner.runner.choose",
            lambda *_: forms.Form(LoopForm(form), "on tapes"),
        ),
    ):
        us.cudagraph_manager = Manager()
        us.cudagraph_manager.stock = stock
        us.use_form(form)
        if form == "unrolled":  # which has a graph of one step and one of many
            with torch.inference_mode():  # as capture_model does
                us.graph_store.prove()
    reset_prefix_cache()  # the proof has used its blocks
    us.recorder = recorder
    recorder.replays = 0
    counter = ENGINE.engine_core.engine_core.scheduler.door.counter
    return {
        "loop": us.stats.loop,
        "reason": us.stats.loop_reason,
        "scheduler can end it": counter.can_end_windows,
    }


def count_replays() -> int:
    return int(runner().recorder.replays)
