"""One output per token, in the order of single steps; what vLLM counts of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from frontend.stream import tokenizer
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import IterationStats, PrefillStats, SchedulerStats
from vllm.v1.outputs import LogprobsLists, SamplingMaskLists

from fusedstep.vllm_plugin.compat import vllm_version
from fusedstep.vllm_plugin.frontend import steps as unfolding
from fusedstep.vllm_plugin.frontend.steps import Steps, unfold

SINCE_0_33 = not str(vllm_version()).startswith("0.32.")
DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


@pytest.fixture(autouse=True)
def _as_in_a_frontend(hooks: None) -> None:
    """With what counts unwatched tokens."""


def add(processor: OutputProcessor, name: str, kind: RequestOutputKind, **fields: Any) -> None:
    params = SamplingParams(output_kind=kind, max_tokens=64, **fields)
    processor.add_request(
        EngineCoreRequest(
            name, [1], None, params, None, 0.0, None, None, None, external_req_id=name
        ),
        None,
    )


def processor() -> OutputProcessor:
    return OutputProcessor(tokenizer(), log_stats=True)


def ids(text: str) -> list[int]:
    found: list[int] = tokenizer().encode(text, add_special_tokens=False)
    return found


def drain(steps: Steps, outputs: EngineCoreOutputs) -> list[EngineCoreOutputs]:
    found: list[EngineCoreOutputs] = [steps.add(outputs)]
    while (step := steps.next()) is not None:
        found.append(step)
    return found


def told(step: EngineCoreOutputs) -> list[tuple[str, list[int]]]:
    return [(output.request_id, output.new_token_ids) for output in step.outputs]


def test_an_error_comes_with_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field of vLLM 0.33."""

    class WithError(EngineCoreOutput):  # type: ignore[misc]
        error: Any = None

    monkeypatch.setattr(unfolding, "EngineCoreOutput", WithError)
    error = object()
    parts = unfold(WithError("r", [7, 8], finish_reason=FinishReason.ERROR, error=error))
    assert [part.error for part in parts] == [None, error]


def test_every_field_of_an_output_has_its_place() -> None:
    """A field that a new vLLM adds is looked at before windows are unfolded with it."""
    assert set(EngineCoreOutput.__struct_fields__) == {
        *("request_id", "new_token_ids"),  # one token each
        *("new_logprobs", "new_sampling_mask", "routed_experts"),  # that token's
        *("trace_headers", "num_nans_in_logits"),  # the same in all
        *("new_prompt_logprobs_tensors", "prompt_token_id_logprobs", "events", "prefill_stats"),
        *("pooling_output", "mm_cache_miss_hashes"),  # first
        *("finish_reason", "stop_reason", "kv_transfer_params", "ec_transfer_params"),  # last
        "spec_decode_metrics",
        *(["error"] if SINCE_0_33 else []),  # last
    }
    assert set(EngineCoreOutputs.__struct_fields__) == {
        *("engine_index", "outputs", "scheduler_stats", "timestamp", "weight_version"),
        *("utility_output", "finished_requests", "wave_complete", "start_wave"),  # first
    }


def test_parts_carry_their_own_and_nothing_twice() -> None:
    rows = np.arange(6.0).reshape(3, 2)
    output = EngineCoreOutput(
        "r",
        [7, 8, 9],
        new_logprobs=LogprobsLists(rows.astype(int), -rows, np.array([1, 2, 3]), [0, 3]),
        new_sampling_mask=SamplingMaskLists(np.array([7, 8, 3, 9]), np.array([0, 1, 3, 4])),
        routed_experts=np.arange(5),
        prefill_stats=PrefillStats(),
        events=[],
        finish_reason=FinishReason.STOP,
        stop_reason=9,
        kv_transfer_params={"a": 1},
        trace_headers={"t": "1"},
    )
    parts = unfold(output)
    assert [part.new_token_ids for part in parts] == [[7], [8], [9]]
    logprobs = [part.new_logprobs for part in parts]
    assert [lists.logprobs.tolist() for lists in logprobs if lists] == [
        [row] for row in (-rows).tolist()
    ]
    assert [lists.sampled_token_ranks.tolist() for lists in logprobs if lists] == [[1], [2], [3]]
    masks = [part.new_sampling_mask for part in parts]
    assert [mask.to_nested_list() for mask in masks if mask] == [[[7]], [[8, 3]], [[9]]]
    experts = [part.routed_experts for part in parts]
    assert [part.tolist() for part in experts if part is not None] == [[0, 1, 2], [3], [4]]
    assert [part.finish_reason for part in parts] == [None, None, FinishReason.STOP]
    assert [part.stop_reason for part in parts] == [None, None, 9]
    assert [part.kv_transfer_params for part in parts] == [None, None, {"a": 1}]
    assert [part.prefill_stats is None for part in parts] == [False, True, True]
    assert [part.events for part in parts] == [[], None, None]
    assert all(part.trace_headers == {"t": "1"} for part in parts)


def test_steps_are_in_the_order_of_single_steps() -> None:
    frontend = processor()
    for name in ("a", "b", "c"):
        add(frontend, name, DELTA)
    outputs = [
        EngineCoreOutput("a", [1, 2, 3]),
        EngineCoreOutput("b", [4]),
        EngineCoreOutput("c", [5, 6], finish_reason=FinishReason.LENGTH),
    ]
    stats = SchedulerStats(num_running_reqs=3, kv_cache_usage=0.5)
    stats.prefix_cache_stats.queries = 9
    found = drain(Steps(frontend), EngineCoreOutputs(0, outputs, stats, 5.0, weight_version="w"))
    assert [told(step) for step in found] == [
        [("a", [1]), ("b", [4]), ("c", [5])],
        [("a", [2]), ("c", [6])],
        [("a", [3])],
    ]
    assert found[1].outputs[1].finish_reason == FinishReason.LENGTH
    assert [step.timestamp for step in found] == [5.0] * 3
    assert [step.weight_version for step in found] == ["w"] * 3
    counted = [step.scheduler_stats for step in found]
    assert [s.prefix_cache_stats.queries for s in counted if s] == [9, 0, 0]
    assert [s.num_running_reqs for s in counted if s] == [3] * 3


def test_single_tokens_pass_as_they_are() -> None:
    frontend = processor()
    add(frontend, "a", DELTA)
    outputs = EngineCoreOutputs(outputs=[EngineCoreOutput("a", [1]), EngineCoreOutput("x", [])])
    steps, given = Steps(frontend), outputs.outputs
    assert steps.add(outputs) is outputs and outputs.outputs is given
    assert steps.next() is None


def test_stop_string_ends_a_request_in_the_middle_of_a_window() -> None:
    """Its later tokens are neither shown nor counted, and the engine is told once."""
    frontend = processor()
    add(frontend, "a", FINAL_ONLY, stop=[" sea"])
    add(frontend, "b", DELTA)
    window = ids("One day by the sea and the hill")
    steps = Steps(frontend)
    outputs = [EngineCoreOutput("a", list(window)), EngineCoreOutput("b", list(window))]
    step: EngineCoreOutputs | None = steps.add(EngineCoreOutputs(outputs=outputs))
    aborts: list[str] = []
    final: list[Any] = []
    counted = 0
    while step is not None:
        stats = IterationStats()
        done = frontend.process_outputs(step.outputs, step.timestamp, stats)
        aborts += done.reqs_to_abort
        final += [out for out in done.request_outputs if out.request_id == "a"]
        counted += stats.num_generation_tokens
        step = steps.next()
    assert aborts == ["a"]
    (output,) = final
    assert output.outputs[0].text == "One day by the"
    assert output.outputs[0].token_ids == ids("One day by the sea")
    assert counted == len(ids("One day by the sea")) + len(window)


@pytest.mark.parametrize("internal", (True, False))
def test_tokens_of_an_aborted_request_do_not_go_to_its_successor(internal: bool) -> None:
    frontend = processor()
    add(frontend, "a", DELTA)
    steps = Steps(frontend)
    steps.add(EngineCoreOutputs(outputs=[EngineCoreOutput("a", [1, 2, 3])]))
    assert frontend.abort_requests(["a"], internal=internal) == ["a"]
    add(frontend, "a", DELTA)
    assert steps.next() is None
    assert told(steps.add(EngineCoreOutputs(outputs=[EngineCoreOutput("a", [4])]))) == [("a", [4])]


def test_final_output_alone_is_not_taken_apart_but_counted_as_steps() -> None:
    """vLLM's statistics are those of single steps: per step its tokens, per later token a gap."""
    frontend = processor()
    for name, kind in (("a", FINAL_ONLY), ("b", FINAL_ONLY), ("c", DELTA)):
        add(frontend, name, kind)
    windows = {"a": [1, 2, 3, 4], "b": [5, 6], "c": [7, 8, 9]}

    def stats(outputs: list[EngineCoreOutputs]) -> list[tuple[int, int]]:
        found = []
        for step in outputs:
            one = IterationStats()
            frontend.process_outputs(step.outputs, step.timestamp, one)
            found.append((one.num_generation_tokens, len(one.inter_token_latencies_iter)))
        return found

    prefill = [EngineCoreOutput(name, [1], prefill_stats=PrefillStats()) for name in windows]
    assert stats([EngineCoreOutputs(outputs=prefill)]) == [(3, 0)]
    whole = EngineCoreOutput("a", windows["a"])
    outputs = [whole, EngineCoreOutput("b", windows["b"]), EngineCoreOutput("c", windows["c"])]
    steps = Steps(frontend)
    found = drain(steps, EngineCoreOutputs(outputs=outputs))
    assert found[0].outputs[0] is whole and whole.new_token_ids == [1, 2, 3, 4]
    assert stats(found) == [(3, 3), (3, 3), (2, 2), (1, 1)]

    frontend.log_stats = False  # nobody counts: nothing is made for it
    whole = EngineCoreOutput("a", [1, 2])
    assert [told(s) for s in drain(steps, EngineCoreOutputs(outputs=[whole]))] == [[("a", [1, 2])]]


def test_gauges_are_all_that_later_steps_repeat() -> None:
    """A field of the scheduler's statistics is a gauge, or counted once."""
    gauges = unfolding._gauges(SchedulerStats())
    assert gauges is not None
    assert set(SchedulerStats.__dataclass_fields__) == {
        *("num_running_reqs", "num_waiting_reqs", "num_skipped_waiting_reqs", "kv_cache_usage"),
        *("num_kv_fetch_reqs_by_stage", "step_counter", "current_wave"),
        *("waiting_lora_adapters", "running_lora_adapters"),
        # counted in the first step
        *("prefix_cache_stats", "connector_prefix_cache_stats", "kv_cache_eviction_events"),
        *("spec_decoding_stats", "kv_connector_stats", "ec_connector_stats", "cudagraph_stats"),
        *("perf_stats", "iteration_details"),
    }
