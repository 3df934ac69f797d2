"""Memory that an engine's processes share: who of them is on one machine, and its names.

A file of another machine is of no use: nobody waits for one, and nobody makes one in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fusedstep.window.arrivals import ArrivalCounter
from fusedstep.window.page import Page, shared_file

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def workers_are_here(vllm_config: VllmConfig) -> bool:
    """Are all workers of this engine on its scheduler's machine? Else they cannot hear of arrivals.

    It is a matter of the executor that runs. vLLM's own start their workers where they are, unless
    they have several nodes or Ray; where another one does is not known.
    """
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    if vllm_config.parallel_config.nnodes_within_dp > 1:
        return False
    executor: type = Executor.get_class(vllm_config)
    return executor is MultiprocExecutor or issubclass(executor, UniProcExecutor)


def engine_is_here(vllm_config: VllmConfig, engine_index: int) -> bool:
    """Is this data-parallel engine on its server's machine? Servers start those themselves."""
    parallel = vllm_config.parallel_config
    first: int = parallel.data_parallel_rank
    return engine_index in range(first, first + parallel.data_parallel_size_local)


def arrival_counter(vllm_config: VllmConfig) -> ArrivalCounter:
    """The one of this engine: its scheduler and its workers open the same.

    Where they share no memory each has one for itself, which nobody raises.
    """
    if not workers_are_here(vllm_config):
        return ArrivalCounter(None)
    rank = vllm_config.parallel_config.data_parallel_index
    return ArrivalCounter(f"{vllm_config.instance_id}-{rank}")


def counts_page(vllm_config: VllmConfig, engine_index: int) -> Page:
    """The page of this engine: its scheduler and its server open the same."""
    return Page(f"{vllm_config.instance_id}-{engine_index}-counts")


def trace_path(vllm_config: VllmConfig, engine_index: int) -> Path:
    """The page by which somebody may ask for a trace of this engine; its scheduler makes it."""
    return shared_file(f"{vllm_config.instance_id}-{engine_index}-trace")
