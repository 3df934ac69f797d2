"""In an engine's child process: hybrid models, and the controls of their tests."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import engine_child
import features_child
import standin_child
import workload_child


def no_checkpoints() -> None:
    """vLLM writes no state inside a prefill: its prefills end where a block ends, as they do for
    gated delta nets.

    Its Mamba2 kernel for CPUs does not return such states, and vLLM ends with an IndexError.
    """
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    if "get_kv_cache_spec" in vars(MambaMixer2):
        del MambaMixer2.get_kv_cache_spec


def _unmasked() -> Any:
    """Rows that are not active advance their state, too."""
    from fusedstep.vllm_plugin.runner.recurrent import RecurrentState

    return patch.object(RecurrentState, "hide_inactive", lambda *_: None)


def _unmoved() -> Any:
    """A row leaves its state behind in the block that is full."""
    from fusedstep.vllm_plugin.runner.recurrent import Alignment

    def columns_alone(self: Any, num_rows: int, rows: Any, positions: Any, columns: Any) -> None:
        columns[:num_rows, 0] = positions[:num_rows] // self.block_size

    return patch.object(Alignment, "move_states", columns_alone)


def run_unmasked(*args: Any) -> dict[str, Any]:
    with _unmasked():
        return workload_child.run(*args)


def run_unmoved(*args: Any) -> dict[str, Any]:
    with _unmoved():
        return workload_child.run(*args)


def recorded_unmasked(form: str, workload: workload_child.Workload) -> dict[str, Any]:
    """On the stand-in GPU, in steps that were recorded so."""
    with _unmasked():
        standin_child.use_loop(form)
        return workload_child.answer(workload)


def recorded_unmoved(form: str, workload: workload_child.Workload) -> dict[str, Any]:
    with _unmoved():
        standin_child.use_loop(form)
        return workload_child.answer(workload)


def _unkept() -> Any:
    """All steps of a window keep their experts in one place."""
    from fusedstep.vllm_plugin.runner.experts import RoutedExperts

    def first_of_all(self: Any, num_rows: int) -> None:
        self.kept[:num_rows] = self.captured[:num_rows].flatten(1).to(self.dtype)

    return patch.object(RoutedExperts, "keep", first_of_all)


def run_unkept(*args: Any) -> dict[str, Any]:
    with _unkept():
        return workload_child.run(*args)


def recorded_unkept(form: str, workload: workload_child.Workload) -> dict[str, Any]:
    with _unkept():
        standin_child.use_loop(form)
        return workload_child.answer(workload)


def run_planned_once(*args: Any) -> dict[str, Any]:
    """Attention keeps the lengths of a window's first step."""
    from fusedstep.vllm_plugin.runner.decode_model import VllmDecodeModel

    build = VllmDecodeModel._build

    def once(self: Any, groups: Any) -> None:
        if not self.attn_metadata:
            for common in self.common:
                common.seq_lens = common.seq_lens.clone()
            build(self, groups)

    with patch.object(VllmDecodeModel, "_build", once):
        return workload_child.run(*args)


def routed_experts(model: str, options: dict[str, Any]) -> list[tuple[list[int], Any]]:
    """Per request its tokens, and the experts of each token in each layer."""
    llm = features_child.use(model, options)
    prompts = [{"prompt_token_ids": [10 + number, 20, 30]} for number in range(3)]
    params = features_child.sampling_params({"max_tokens": 12, "ignore_eos": True})
    answers = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
    return [(list(answer.token_ids), answer.routed_experts.tolist()) for answer in answers]


def cache() -> tuple[str, int, int]:
    """How states are cached, the tokens of a block, and the number of blocks."""
    scheduler = engine_child.scheduler()
    config = scheduler.vllm_config.cache_config
    return (
        config.mamba_cache_mode,
        config.mamba_block_size,
        scheduler.kv_cache_config.num_blocks,
    )


def limits() -> dict[str, int]:
    """What bound the length of this engine's windows so far, and how often."""
    return {str(reason): n for reason, n in engine_child.scheduler().counts.limits.items()}
