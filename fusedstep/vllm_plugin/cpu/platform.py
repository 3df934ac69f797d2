"""CPU platforms: vLLM's own, with Model Runner V2's kernels native and async scheduling kept."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm.platforms.cpu import CpuPlatform

from fusedstep.vllm_plugin import compat
from fusedstep.vllm_plugin.compat import BACKEND, BACKEND_CLS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.fusedstep")

# Vision towers with a Triton kernel and the same in torch. In bfloat16 Triton's interpreter (3.9)
# gives NaN for some of their position embeddings.
TOWERS = ("qwen3_vl", "cohere_compass", "kimi_k25_vit")


class OracleCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """Stock Model Runner V2 on the CPU: what ``verify`` compares sampled requests with."""

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """Native kernels: vLLM's own for the CPU, and ours for Model Runner V2."""
        import vllm.triton_utils  # asks for the platform: not while it is being chosen
        from vllm.triton_utils import dispatcher
        from vllm.v1.sample.ops import topk_topp_sampler

        from fusedstep.vllm_plugin.cpu import stock_kernels

        dispatcher.sys = _ModulesOfVllm()
        topk_topp_sampler.HAS_TRITON = False  # torch sorts faster than an interpreted kernel
        vllm.triton_utils.HAS_TRITON = False  # vLLM's CPU kernels are for "no Triton"
        try:
            super().register_triton_kernel_overrides()
        finally:
            vllm.triton_utils.HAS_TRITON = True
        stock_kernels.register()

    @classmethod
    def get_vit_attn_backend(cls, *args: Any, **kwargs: Any) -> Any:
        """vLLM's; asked for while a vision tower is built, whose module is imported by then."""
        for name in TOWERS:
            tower: Any = sys.modules.get(f"vllm.model_executor.models.{name}")
            if tower is not None:
                tower.HAS_TRITON = False  # as it is in vLLM's CPU build: torch instead
        return super().get_vit_attn_backend(*args, **kwargs)


class FusedStepCpuPlatform(OracleCpuPlatform):
    """The CPU as fusedstep's device: the engine may schedule ahead of the worker."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """vLLM's CPU settings, but with the async scheduling that the user would get on CUDA."""
        scheduler_config = vllm_config.scheduler_config
        async_scheduling = scheduler_config.async_scheduling
        super().check_and_update_config(vllm_config)
        if scheduler_config.scheduler_cls == compat.SCHEDULER_CLS:
            scheduler_config.async_scheduling = async_scheduling

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """vLLM's CPU attention; FUSEDSTEP, interpreted, if it is asked for with ``--ops triton``.

        Raises ValueError, as vLLM does, where our attention cannot do what the model needs.
        """
        from vllm.config import get_current_vllm_config  # it imports the platform

        ours = selected_backend is not None and selected_backend.get_path() == BACKEND_CLS
        if not ours or compat.options(get_current_vllm_config()).ops != "triton":
            if ours:
                logger.warning(
                    "%s attention is for GPUs: CPU_ATTN on this CPU (--ops triton interprets it)",
                    BACKEND,
                )
                selected_backend = None
            return str(
                super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
            )
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"{BACKEND} attention cannot run this model: {', '.join(reasons)}")
        return str(selected_backend.get_path())


class _ModulesOfVllm:
    """``sys`` for vLLM's dispatcher, which looks into every object of every module: 280,000 of
    them, for kernels of vLLM's own. One of llvmlite's answers ``__dict__`` with a function."""

    @property
    def modules(self) -> dict[str, ModuleType]:
        return {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "vllm"}
