"""Where unfolding hangs on vLLM, and where it does not."""

from __future__ import annotations

import asyncio
import queue
from types import SimpleNamespace
from typing import Any

import pytest
from frontend.stream import tokenizer
from scheduler.world import _base_config
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import AsyncMPClient, InprocClient, SyncMPClient
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.output_processor import OutputProcessor

from fusedstep.vllm_plugin import compat, reasons
from fusedstep.vllm_plugin.frontend import unfold
from fusedstep.vllm_plugin.frontend.steps import Steps
from fusedstep.vllm_plugin.scheduler.scheduler import FusedStepScheduler

STOCK = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"


class OwnScheduler(FusedStepScheduler):
    """Somebody's, made of ours."""


def config(scheduler: Any, speculative: Any = None, is_diffusion: bool = False) -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler),
        speculative_config=speculative,
        model_config=SimpleNamespace(is_diffusion=is_diffusion),
    )


@pytest.mark.parametrize(
    ("given", "ours"),
    (
        (config(compat.SCHEDULER_CLS), True),
        (config(f"{__name__}.OwnScheduler"), True),
        (config(FusedStepScheduler), True),
        (config(None), False),
        (config(STOCK), False),
        (config(compat.SCHEDULER_CLS, speculative=object()), False),
        (config(compat.SCHEDULER_CLS, is_diffusion=True), False),
    ),
)
def test_only_windows_are_unfolded(given: Any, ours: bool) -> None:
    assert compat.hands_over_windows(given) == ours


def test_a_frontend_in_rust_takes_stock_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_config = _base_config()
    assert reasons.engine_reason(vllm_config) != "frontend in Rust"
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    monkeypatch.setattr(type(vllm_config), "use_v2_model_runner", True)
    assert reasons.engine_reason(vllm_config) == "frontend in Rust"


def processor() -> OutputProcessor:
    made = OutputProcessor(tokenizer(), log_stats=False)
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    made.add_request(
        EngineCoreRequest("r", [1], None, params, None, 0.0, None, None, None, external_req_id="r"),
        None,
    )
    return made


def window(*tokens: int) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=[EngineCoreOutput("r", list(tokens))])


def tokens(outputs: EngineCoreOutputs) -> list[list[int]]:
    return [output.new_token_ids for output in outputs.outputs]


def client(cls: Any, *windows: EngineCoreOutputs) -> Any:
    """One that the engine has handed these, without an engine."""
    made = object.__new__(cls)
    if cls is InprocClient:
        left = iter(windows)
        made.engine_core = SimpleNamespace(
            step_fn=lambda: ({0: next(left)}, True), post_step=lambda model_executed: None
        )
        return made
    made.outputs_queue = asyncio.Queue() if cls is AsyncMPClient else queue.Queue()
    made._ensure_output_queue_task = lambda: None
    for one in windows:
        made.outputs_queue.put_nowait(one)
    return made


@pytest.mark.parametrize("cls", (InprocClient, SyncMPClient))
def test_clients_hand_over_step_by_step(hooks: None, cls: Any) -> None:
    stock = client(cls, window(1, 2))
    assert tokens(stock.get_output()) == [[1, 2]]
    ours = client(cls, window(1, 2, 3), window(4))
    ours.steps = Steps(processor())
    assert [tokens(ours.get_output()) for _ in range(4)] == [[[1]], [[2]], [[3]], [[4]]]


def test_async_client_hands_over_step_by_step_and_lets_others_run(
    hooks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfold, "CHUNK", 3)

    async def take() -> list[Any]:
        stock = client(AsyncMPClient, window(1, 2))
        seen: list[Any] = [tokens(await stock.get_output_async())]
        ours = client(AsyncMPClient, window(1, 2, 3, 4), window(5))
        ours.steps = Steps(processor())
        asyncio.get_running_loop().call_soon(seen.append, "another")
        for _ in range(5):
            seen.append(tokens(await ours.get_output_async()))
        return seen

    assert asyncio.run(take()) == [[[1, 2]], [[1]], [[2]], [[3]], "another", [[4]], [[5]]]


def test_hooks_hang_once(hooks: None) -> None:
    hung = LLMEngine.__init__, OutputProcessor.process_outputs, SyncMPClient.get_output
    unfold.unfold_windows()
    again = LLMEngine.__init__, OutputProcessor.process_outputs, SyncMPClient.get_output
    assert again == hung
