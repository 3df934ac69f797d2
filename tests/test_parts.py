"""Parts of vLLM's runner that windows do not know: a stand-in of each kind gives its reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.worker.gpu.kv_connector import (
    NO_OP_KV_CONNECTOR,
    ActiveKVConnector,
    KVConnector,
)
from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner
from vllm.v1.worker.gpu.mm.rope import RopeState
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner
from vllm.v1.worker.gpu.model_states.prompt_embeds import PromptEmbedsState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.thinking_budget import ThinkingBudgetState

from fusedstep.vllm_plugin.runner import parts

INPUTS: dict[str, type] = {
    "encoder_runner": EncoderRunner,
    "mm_pruner": MultiModalPruner,
    "prompt_embeds_state": PromptEmbedsState,
    "rope_state": RopeState,
}

OTHERS = (
    *("adaptive_verification", "aux_output_connector", "fast_prefill", "pcp_manager"),
    *("pooling_runner", "pp_handler", "rejection_sampler", "speculator", "ubatch_runner"),
)


def bare(cls: type, **attributes: Any) -> Any:
    """An object of this very class, of which nothing but these attributes is there."""
    made = object.__new__(cls)
    vars(made).update(attributes)
    return made


def runner(**inputs: Any) -> Any:
    """vLLM's runner of a model that takes images, by its parts."""
    inputs = {name: bare(cls) for name, cls in INPUTS.items()} | inputs
    inputs["encoder_runner"].is_realtime = getattr(inputs["encoder_runner"], "is_realtime", False)
    state = bare(DefaultModelState, supports_mm_inputs=True, **inputs)
    sampler = bare(
        Sampler,
        logits_processors=[bare(processor) for processor in parts.LOGITS_PROCESSORS],
        thinking_budget_state=bare(ThinkingBudgetState),
    )
    others = dict.fromkeys(OTHERS)
    return SimpleNamespace(
        model_state=state, sampler=sampler, kv_connector=NO_OP_KV_CONNECTOR, **others
    )


def test_known_inputs_are_let_through() -> None:
    assert parts.runner_reason(runner()) is None
    without = dict.fromkeys(set(INPUTS) - {"encoder_runner"})
    assert parts.runner_reason(runner(**without)) is None


@pytest.mark.parametrize("name", INPUTS)
def test_an_unknown_kind_of_input_takes_stock_steps(name: str) -> None:
    """A subclass may do more in a decode step than vLLM's own class."""
    unknown = type("Unknown", (INPUTS[name],), {})
    reason = parts.runner_reason(runner(**{name: bare(unknown)}))
    assert reason == "model state with Unknown"


@pytest.mark.parametrize("name", OTHERS)
def test_an_unknown_part_of_the_runner_takes_stock_steps(name: str) -> None:
    us = runner()
    setattr(us, name, object())
    assert parts.runner_reason(us) is not None


def test_a_state_or_sampler_of_another_class_takes_stock_steps() -> None:
    us = runner()
    us.model_state = bare(type("OwnState", (DefaultModelState,), {}))
    assert parts.runner_reason(us) == "model state OwnState"
    us = runner()
    us.sampler = bare(type("OwnSampler", (Sampler,), {}))
    assert parts.runner_reason(us) == "sampler OwnSampler"


def test_a_kv_connector_with_hooks_of_another_class_takes_stock_steps() -> None:
    us = runner()
    us.kv_connector = bare(ActiveKVConnector)
    assert parts.runner_reason(us) is None
    us.kv_connector = bare(type("OwnHooks", (KVConnector,), {}))
    assert parts.runner_reason(us) == "KV connector OwnHooks"


def test_a_realtime_model_takes_stock_steps() -> None:
    """Its media come while it decodes."""
    assert parts.runner_reason(runner(encoder_runner=bare(EncoderRunner, is_realtime=True))) == (
        "realtime model"
    )


def test_a_batch_whose_encoder_runs_takes_a_stock_step() -> None:
    from vllm.v1.core.sched.output import SchedulerOutput

    output = SchedulerOutput.make_empty()
    assert parts.batch_reason(output) is None
    output.scheduled_encoder_inputs = {"a": [0]}
    assert parts.batch_reason(output) == "a batch with scheduled encoder inputs"
