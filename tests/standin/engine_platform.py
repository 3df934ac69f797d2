"""vLLM's platform on the stand-in. Imported while vLLM chooses it: no vLLM at module level."""

from __future__ import annotations

from typing import Any

from standin.device import enqueue, readable

from fusedstep.vllm_plugin.cpu.platform import FusedStepCpuPlatform

SETTINGS: dict[str, Any] = {}  # of the engine (``standin_child.DEFAULTS``)


class StandInPlatform(FusedStepCpuPlatform):
    """The CPU build, as far as its kernels go; graphs as on CUDA."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        super().check_and_update_config(vllm_config)
        compilation = vllm_config.compilation_config
        from vllm.config.compilation import CompilationMode, CUDAGraphMode

        compilation.mode = CompilationMode.NONE
        compilation.cudagraph_mode = CUDAGraphMode[SETTINGS["cudagraph_mode"]]
        compilation.cudagraph_capture_sizes = list(SETTINGS["capture_sizes"])
        compilation.max_cudagraph_capture_size = max(SETTINGS["capture_sizes"])

    @classmethod
    def get_attn_backend_cls(cls, *_: Any, **__: Any) -> str:
        return "standin.engine.StandInAttention"

    @classmethod
    def graph_pool_handle(cls) -> Any:
        from standin.graphs import Pool

        return Pool()

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return True

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """vLLM's kernels are launches: queued."""
        from fusedstep.vllm_plugin.cpu import stock_kernels

        stand_ins = stock_kernels._stand_ins
        stock_kernels._stand_ins = lambda: {n: launched(k) for n, k in stand_ins().items()}
        super().register_triton_kernel_overrides()


def launched(kernel: Any) -> Any:
    def launch(*args: Any, **kwargs: Any) -> None:
        readable((*args, *kwargs.values()))
        enqueue(lambda: kernel(*args, **kwargs))

    return launch
