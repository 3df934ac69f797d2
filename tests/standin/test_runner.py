"""What the runner does around vLLM's start on a GPU, which initialises its KV cache twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from fusedstep.ops.dispatch import Choice
from fusedstep.vllm_plugin.runner import runner as module
from fusedstep.vllm_plugin.runner.runner import FusedStepRunner
from fusedstep.vllm_plugin.runner.truncation import truncate_as_stock


class Scratch(NamedTuple):
    """What the operations allocate, in words."""

    num_rows: int
    vocab_size: int
    device: torch.device
    adjusted: str = "all logits"
    limit_k: str = "k"
    limit_p: str = "p"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A runner without a model. ``bound``: the scratch that each start's operations got."""
    seen = SimpleNamespace(events=[], bound=[], truncations=[], inference=[])
    stock = FusedStepRunner.__base__
    monkeypatch.setattr(stock, "initialize_kv_cache", lambda *_, **__: None)
    monkeypatch.setattr(stock, "profile_run", lambda *_: seen.events.append("profile"))
    monkeypatch.setattr(stock, "capture_model", lambda *_, **__: 1)
    monkeypatch.setattr(FusedStepRunner, "_choose_form", lambda *_: None)
    monkeypatch.setattr(FusedStepRunner, "_note_form", lambda *_: None)
    monkeypatch.setattr(module.compat, "options", lambda _: SimpleNamespace(loop="auto"))
    monkeypatch.setattr(module, "PrefillSampler", lambda *_: None)
    monkeypatch.setattr(module, "Processing", lambda *_: None)
    monkeypatch.setattr(module, "DeviceMasks", lambda *_: None)
    monkeypatch.setattr(module, "arrival_counter", lambda _: seen.events.append("counter"))
    monkeypatch.setattr(module, "allocate_buffers", lambda *args: seen.events.append(args))

    class Step:
        """The Triton step operations, without tensors."""

        def __init__(self, state: Any, *, scratch: Any, truncation: Any) -> None:
            seen.bound.append(scratch[:3])
            seen.truncations.append(truncation)

        @staticmethod
        def allocate_scratch(*shape: Any) -> Any:
            seen.events.append("scratch")
            return Scratch(*shape)

    static = SimpleNamespace(overwritten=lambda: seen.events.append("overwritten"))
    tables = SimpleNamespace(state=SimpleNamespace(block_tables=()), static=static)
    monkeypatch.setattr(module, "DeviceTables", lambda *_: tables)

    def grammars(*shape: Any) -> Any:
        seen.events.append("grammars")
        return SimpleNamespace(state=shape)

    monkeypatch.setattr(module, "Grammars", grammars)
    monkeypatch.setattr(module.dispatch, "load", lambda _: Step)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: seen.events.append("waited"))
    monkeypatch.setattr(module.reasons, "cache_reason", lambda _: None)
    monkeypatch.setattr(module, "runner_reason", lambda _: None)
    monkeypatch.setattr(module, "metadata_reason", lambda _: None)

    def record(**_: Any) -> int:
        seen.inference.append(torch.is_inference_mode_enabled())
        return 2

    runner = object.__new__(FusedStepRunner)
    vars(runner).update(
        engine_reason=None,
        no_windows=None,
        ops_choice=Choice("triton", ""),
        scratch=None,
        grammars=None,
        speculator=None,
        rounds=None,
        experts=None,
        aux_output_connector=None,
        model_config=SimpleNamespace(skip_tokenizer_init=False),
        graph_memory={},
        max_num_reqs=3,
        vocab_size=11,
        device=torch.device("cpu"),
        vllm_config=None,
        sampler=None,
        graph_store=SimpleNamespace(record=record),
    )
    seen.runner = runner
    return seen


def test_scratch_is_made_while_vllm_measures_and_once(started: SimpleNamespace) -> None:
    runner = started.runner
    runner.profile_run()
    runner.initialize_kv_cache(None, is_profiling=True)
    runner.initialize_kv_cache(None)
    assert started.events[:3] == ["scratch", "grammars", "profile"]
    assert started.events.count("scratch") == started.events.count("grammars") == 1
    assert started.bound == [(3, 11, torch.device("cpu"))] * 2


def test_a_cpu_truncates_by_our_own_kernel(started: SimpleNamespace) -> None:
    started.runner.initialize_kv_cache(None)
    assert started.truncations == [None]


def test_a_gpu_truncates_as_stock(started: SimpleNamespace) -> None:
    """vLLM's buffers are made for the largest batch, while it measures its memory, and once."""
    runner = started.runner
    runner.device = torch.device("cuda")
    runner.profile_run()
    runner._step_class()(None)
    assert started.truncations == [truncate_as_stock]
    assert started.events == ["scratch", ("all logits", "k", "p"), "grammars", "profile"]


def test_one_page_of_arrivals(started: SimpleNamespace) -> None:
    """The driver has the first one registered: it must stay mapped."""
    for _ in range(2):
        started.runner.initialize_kv_cache(None)
    assert started.events.count("counter") == 1


def test_recording_is_inference(started: SimpleNamespace) -> None:
    """As vLLM's own: else activations stay for a backward pass that never comes."""
    started.runner.initialize_kv_cache(None)
    assert started.runner.capture_model() == 3
    started.runner.use_form("replay")
    assert started.inference == [True, True]
    assert "overwritten" in started.events  # by the proof: requests get their own values again


def test_start_ends_when_the_device_is_done(started: SimpleNamespace) -> None:
    """Nobody else waits for vLLM's last capture, with windows and without."""
    runner = started.runner
    runner.initialize_kv_cache(None)
    runner.capture_model()
    assert started.events[-2:] == ["overwritten", "waited"]
    runner.engine_reason = "a model"
    started.events.clear()
    assert runner.capture_model() == 1
    assert started.events == ["waited"]


def test_scheduler_hears_of_an_engine_that_keeps_stock_steps(started: SimpleNamespace) -> None:
    """It would reserve blocks and tokens for windows that never come."""
    runner = started.runner
    assert runner.stock_steps_reason is None
    runner.no_windows = "no graphs"
    assert runner.stock_steps_reason == "no graphs"
    runner.engine_reason = "a model"
    assert runner.stock_steps_reason == "a model"
