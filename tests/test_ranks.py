"""Data-parallel ranks agree on the steps of a turn, in the all-reduce of vLLM's own step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scheduler.trace import Spec, Trace
from scheduler.world import STOCK, make_scheduler
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import dp_utils, model_runner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from fusedstep.vllm_plugin import reasons
from fusedstep.vllm_plugin.runner import ranks
from fusedstep.vllm_plugin.runner.ranks import JOINS, Ranks

Rank = Callable[[int, int], Any]  # (number of ranks, rank) -> what it takes from the agreement


def windows(num_reqs: int, num_steps: int) -> Rank:
    return lambda size, rank: Ranks(size, rank).agree(num_reqs, num_steps)


def stock(num_tokens: int, num_reqs: int) -> Rank:
    """vLLM's own step of such a batch, for which it has a graph."""
    graph = BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, num_tokens, num_reqs)
    return lambda size, rank: dp_utils.sync_cudagraph_and_dp_padding(
        None, graph, num_tokens, num_reqs, None, size, rank
    )


@pytest.fixture
def agreed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs the ranks in threads, which sum what they give in one all-reduce."""

    def run(*of_ranks: Rank) -> list[Any]:
        given: list[torch.Tensor] = []
        barrier = threading.Barrier(len(of_ranks), timeout=10)

        def all_reduce(tensor: torch.Tensor, group: str) -> None:
            assert group == "gloo"
            given.append(tensor.clone())
            barrier.wait()
            tensor.copy_(torch.stack(given).sum(0))
            barrier.wait()

        group = SimpleNamespace(cpu_group="gloo")
        for module in (ranks, dp_utils):
            monkeypatch.setattr(module, "get_dp_group", lambda: group)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        size = len(of_ranks)
        with ThreadPoolExecutor(size) as pool:
            futures = [pool.submit(each, size, n) for n, each in enumerate(of_ranks)]
            results = [future.result() for future in futures]
        assert len(given) == size  # one all-reduce for each
        return results

    return run


@pytest.mark.parametrize(
    ("offers", "steps"),
    (
        ([(4, 7), (2, 3)], 3),
        ([(4, 2), (4, 2)], 2),  # as vLLM asks for microbatches
        ([(1, 64), (1, JOINS), (3, 20)], 20),
        ([(1, 1), (1, JOINS)], 1),
        ([(1, JOINS), (1, JOINS)], 1),
    ),
)
def test_the_least_of_all(agreed: Any, offers: list[tuple[int, int]], steps: int) -> None:
    for (_, offer), agreement in zip(offers, agreed(*(windows(*o) for o in offers)), strict=True):
        assert agreement.num_steps == steps
        assert agreement.is_cut == (steps < offer < JOINS)
        assert agreement.sync.num_tokens_across_dp.tolist() == [n for n, _ in offers]


@pytest.mark.parametrize("offer", (1, 2, 7, JOINS))
def test_a_stock_step_takes_part(agreed: Any, offer: int) -> None:
    """vLLM's own function, which knows nothing of windows: one step on all, unpadded and eager."""
    (descriptor, sync), agreement = agreed(stock(30, 3), windows(4, offer))
    assert (descriptor.num_tokens, descriptor.num_ubatches) == (30, 1)
    assert descriptor.cg_mode == CUDAGraphMode.NONE and sync.eager
    assert sync.num_tokens_across_dp.tolist() == [30, 4]
    assert agreement.num_steps == 1
    assert agreement.sync.num_tokens_across_dp.tolist() == [30, 4]


@pytest.mark.parametrize(
    ("part", "option", "value", "words"),
    (
        ("device_config", "device_type", "cuda", "on a device that is not a CPU"),
        ("parallel_config", "tensor_parallel_size", 2, "with tensor parallelism"),
        ("parallel_config", "enable_expert_parallel", True, "with expert parallelism"),
        ("parallel_config", "enable_elastic_ep", True, "of elastic experts"),
        ("model_config", "is_hybrid", True, "with recurrent states"),
        ("model_config", "is_multimodal_model", True, "of a multimodal model"),
        (None, "lora_config", object(), "with LoRA"),
    ),
)
def test_what_was_not_tried(part: str | None, option: str, value: Any, words: str) -> None:
    config = make_scheduler(Trace((Spec((1,), 0, 1),)), STOCK[True]).vllm_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        patch.setattr(config.parallel_config, "data_parallel_size", 2)
        assert reasons.engine_reason(config) is None
        changed: Any = getattr(config, part) if part else config
        if isinstance(getattr(type(changed), option, None), property):
            changed = type(changed)
        patch.setattr(changed, option, value)
        assert reasons.engine_reason(config) == f"data parallelism {words}"


def test_dummy_batches_join_without_an_agreement_each(agreed: Any) -> None:
    """As many as the window has steps; Model Runner V2 is told what was agreed."""
    told: list[Any] = []
    joined = []
    before = model_runner.dispatch_cg_and_sync_dp

    def batch() -> None:
        descriptor, sync = model_runner.dispatch_cg_and_sync_dp(
            None, 1, 1, 1, dp_size=2, dp_rank=1, need_eager=True
        )
        told.append((descriptor.num_tokens, sync.num_tokens_across_dp.tolist()))

    def joins(size: int, rank: int) -> None:
        each = Ranks(size, rank)
        each.join(batch)
        joined.append(each.as_dict())

    agreed(windows(4, 7), joins)
    assert told == [(1, [4, 1])] * 7
    assert joined == [{"cut": 0, "joined_steps": 7}]
    assert model_runner.dispatch_cg_and_sync_dp is before
