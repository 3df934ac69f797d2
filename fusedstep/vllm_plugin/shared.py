"""Memory that an engine's processes share: one name for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fusedstep.window.arrivals import ArrivalCounter
from fusedstep.window.page import Page, shared_file

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def arrival_counter(vllm_config: VllmConfig) -> ArrivalCounter:
    """The one of this engine: its scheduler and its workers open the same."""
    rank = vllm_config.parallel_config.data_parallel_index
    return ArrivalCounter(f"{vllm_config.instance_id}-{rank}")


def counts_page(vllm_config: VllmConfig, engine_index: int) -> Page:
    """The page of this engine: its scheduler and its server open the same."""
    return Page(f"{vllm_config.instance_id}-{engine_index}-counts")


def trace_path(vllm_config: VllmConfig, engine_index: int) -> Path:
    """The page by which somebody may ask for a trace of this engine; its scheduler makes it."""
    return shared_file(f"{vllm_config.instance_id}-{engine_index}-trace")
