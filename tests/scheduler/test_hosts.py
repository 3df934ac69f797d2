"""Engines whose processes are on more than one machine share no memory: what each may rely on."""

from __future__ import annotations

import json
import logging
import mmap
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler import world
from scheduler.engine import Engine
from scheduler.trace import Spec, Trace
from scheduler.watched import Watched
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.executor import ray_utils
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from fusedstep.reasons import Reason
from fusedstep.vllm_plugin import compat, metrics, reasons, shared
from fusedstep.window.arrivals import END_AFTER_ONE_STEP, NEVER_END


class OnRay(MultiprocExecutor):
    """As vLLM's RayExecutorV2: it starts its workers anywhere."""

    uses_ray = True


class OfSomebody(Executor):
    """A framework's own."""


NODES = {"tensor_parallel_size": 2, "nnodes": 2, "distributed_executor_backend": "mp"}
ENGINES: dict[str, tuple[dict[str, Any], bool]] = {
    "one process": ({}, True),
    "workers": ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, True),
    "torchrun": ({"distributed_executor_backend": "external_launcher"}, True),
    "two nodes": (NODES, False),
    "the second node": (NODES | {"node_rank": 1}, False),
    "an engine per node": (NODES | {"tensor_parallel_size": 1, "data_parallel_size": 2}, True),
    "four nodes, two each": (NODES | {"data_parallel_size": 2, "nnodes": 4}, False),
    "Ray's": ({"distributed_executor_backend": OnRay}, False),
    "somebody's": ({"distributed_executor_backend": OfSomebody}, False),
}
# Requests that come while others decode, offline ones: no stream limits the windows.
SPECS = tuple(
    Spec((1, 2, 3), at, 90, ignore_eos=True, aborted_after=after)
    for at, after in ((0, None), (30, None), (41, 5), (77, None))
)
TRACE = Trace(SPECS, max_model_len=400, step_ms=5.0)


def parallel(options: dict[str, Any]) -> ParallelConfig:
    """vLLM's own, with the ranks of data parallelism where ``--nnodes`` puts them."""
    ours = {"data_parallel_size_local": 1} if options.get("data_parallel_size") else {}
    executor = options.get("distributed_executor_backend")
    made = ParallelConfig(**options | ours | {"distributed_executor_backend": None})
    vars(made)["distributed_executor_backend"] = executor or "uni"  # Ray is not installed
    return made


def config(options: dict[str, Any], name: str = "hosts") -> Any:
    return SimpleNamespace(
        instance_id=f"{name}-{os.getpid()}",
        parallel_config=parallel(options),
        scheduler_config=SimpleNamespace(scheduler_cls=compat.SCHEDULER_CLS),
    )


def files(name: str = "hosts") -> list[Path]:
    folder = shared.trace_path(config({}, name), 0).parent
    return sorted(folder.glob(f"fusedstep-{name}-{os.getpid()}*"))


@pytest.mark.parametrize("name", ENGINES)
def test_who_hears_of_arrivals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor is asked. Where workers may be elsewhere nobody makes or opens a file."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # vLLM's, for torchrun
    options, here = ENGINES[name]
    assert shared.workers_are_here(config(options)) == here
    writer, reader = (shared.arrival_counter(config(options)) for _ in range(2))
    try:
        writer.add()
        assert len(files()) == here and reader.exceeds(0) == here
        writer.can_end_windows = False  # a worker, of its form of the loop
        assert reader.can_end_windows != here
        assert reader.address % mmap.PAGESIZE == 0  # which a GPU's driver maps
    finally:
        writer.unlink()
    assert files() == []


@pytest.mark.parametrize(("launcher", "workers"), [("external_launcher", 2), ("mp", 2), ("uni", 1)])
def test_schedulers_of_one_engine_make_no_windows(launcher: str, workers: int) -> None:
    """torchrun's workers schedule each for itself, and would not take the same steps."""
    vllm_config = world.make_scheduler(TRACE, world.STOCK[True]).vllm_config
    made = vllm_config.parallel_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        patch.setitem(vars(made), "distributed_executor_backend", launcher)
        patch.setitem(vars(made), "world_size", workers)
        reason = reasons.engine_reason(vllm_config)
    own = launcher == "external_launcher"
    assert reason == (Reason.OWN_SCHEDULERS if own else None)


def windows_of(engine: Engine) -> tuple[list[int], list[int]]:
    """Of each turn the steps that a device took, and the arrivals that were stamped on it."""
    steps, stamps = [], []
    stock = engine.scheduler.update_from_output

    def update(output: Any, result: Any) -> Any:
        steps.append(max(map(len, result.sampled_token_ids), default=0))
        stamps.append(getattr(output, "arrivals_seen", NEVER_END))
        return stock(output, result)

    engine.scheduler.update_from_output = update
    engine.run()
    return steps, stamps


@pytest.mark.parametrize("asynchronous", (True, False))
def test_workers_of_two_nodes_take_the_same_steps(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one beside the scheduler could see arrivals, the other sees none: both must agree."""
    stock = world._vllm_config

    def over_two_nodes(trace: Trace, decode_steps: str) -> Any:
        made = stock(trace, decode_steps)
        vars(made.parallel_config).update(vars(parallel(NODES)))
        made.parallel_config.worker_cls = compat.WORKER_CLS
        return made

    monkeypatch.setattr(world, "_vllm_config", over_two_nodes)
    trace = replace(TRACE, asynchronous=asynchronous)
    beside, elsewhere = (Engine(trace, Watched, "auto") for _ in range(2))
    elsewhere.device.arrivals = lambda: 0
    steps, stamps = windows_of(beside)
    assert (steps, stamps) == windows_of(elsewhere)
    assert set(stamps) <= {NEVER_END, END_AFTER_ONE_STEP} and NEVER_END in stamps
    # Nothing ends them: the latency limit is for every batch.
    assert max(steps) == 9 and beside.scheduler.last_decision.reason in Reason
    assert Reason.CANNOT_END in beside.scheduler.counts.limits
    assert [answer.tokens for answer in beside.answers] == [
        answer.tokens for answer in elsewhere.answers
    ]


SERVERS: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "alone": ({}, [0], [0]),
    "two engines here": ({"data_parallel_size": 2, "data_parallel_size_local": 2}, [0, 1], [0, 1]),
    "one elsewhere": ({"data_parallel_size": 2, "data_parallel_size_local": 1}, [0, 1], [0]),
    "none here": ({"data_parallel_size": 2, "data_parallel_size_local": 0}, [0, 1], []),
    "external balancing": (
        {"data_parallel_size": 2, "data_parallel_size_local": 1, "data_parallel_rank": 1},
        [1],
        [1],
    ),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_makes_pages_of_its_own_machine_s_engines(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options, managed, here = SERVERS[name]
    monkeypatch.setattr(metrics, "engines", [])
    monkeypatch.setattr(metrics.REGISTRY, "register", lambda _: None)
    monkeypatch.setattr(metrics.logger, "propagate", True)
    made = SimpleNamespace(
        instance_id=f"served-{os.getpid()}",
        parallel_config=SimpleNamespace(
            **{"data_parallel_rank": 0, "data_parallel_size_local": 1} | options
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=compat.SCHEDULER_CLS),
    )
    try:
        with caplog.at_level(logging.WARNING):
            loggers = [metrics.WindowStatLogger(made, engine) for engine in managed]
        assert [int(each.engine) for each in metrics.engines] == here
        pages = [f"fusedstep-{made.instance_id}-{engine}-counts" for engine in here]
        assert [path.name for path in files("served")] == pages
        told = [record.getMessage() for record in caplog.records]
        assert told == [
            f"fusedstep: engine {engine} is on another machine: its windows are not counted here"
            for engine in managed
            if engine not in here
        ]
        for each in loggers:
            each.log()  # nothing to say, and nothing to fail on
    finally:
        for path in files("served"):
            path.unlink()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "external balancing of a dense model": (
        {"data_parallel_size": 2, "data_parallel_rank": 1},
        "Non-MoE models do not support external data parallel mode. For external load balancing,"
        " launch independent vLLM instances without --data-parallel-* arguments.",
    ),
    "workers that the nodes cannot share": (
        {"tensor_parallel_size": 3, "nnodes": 2},
        "`--nnodes 2` must evenly divide the total world size (3).",
    ),
    "Ray": ({"distributed_executor_backend": "ray"}, "No module named 'ray'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_is_in_its_words(name: str, tmp_path: Path) -> None:
    """docs/scale.md quotes them."""
    options, words = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(world.MODEL))
    args = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, **options)
    with pytest.raises(ValueError) as error:
        args.create_engine_config()
    assert words in str(error.value)


def test_vllm_refuses_its_executor_on_ray_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with Ray installed and started, which a stand-in is. docs/scale.md quotes them."""
    monkeypatch.setattr(ray_utils, "ray", SimpleNamespace(is_initialized=lambda: True))
    with pytest.raises(ValueError) as error:
        ray_utils.initialize_ray_cluster(parallel({}))
    assert str(error.value) == "current platform cpu does not support ray."
