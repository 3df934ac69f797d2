"""vLLM on the stand-in: its worker, an attention, and its CUDA start."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from standin import graphs
from standin.device import CUDA, GPU, enqueue, readable, running
from standin.engine_platform import SETTINGS
from standin.modes import on_device
from standin_child import memory_of

from fusedstep.ops import native
from fusedstep.ops.triton_step import TritonStep
from fusedstep.vllm_plugin.attention import (
    FusedStepAttentionBackend,
    FusedStepAttentionImpl,
)


class StandInAttentionImpl(FusedStepAttentionImpl):
    """One launch in plain torch, for any batch."""

    def forward(self, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any,
                output: Any, *_: Any, **__: Any) -> Any:  # fmt: skip
        if metadata is None:
            return output.fill_(0)
        inputs = (
            metadata.block_table,
            metadata.seq_lens,
            metadata.slot_mapping,
            metadata.query_start_loc,
        )
        readable((query, key, value, cache, output, *inputs))
        enqueue(lambda: attend(query, key, value, cache, output, self.scale, *inputs))
        return output

    def do_kv_cache_update(self, *_: Any) -> None:
        raise AssertionError("forward writes the cache")


def attend(
    query: torch.Tensor,  # [num_tokens, num_heads, size]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, size]
    value: torch.Tensor,
    cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * size]
    output: torch.Tensor,
    scale: float,
    table: torch.Tensor,
    lens: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Write the cache, then each row's causal attention."""
    used, block_size, size = slots >= 0, cache.shape[2], query.shape[-1]
    states = torch.cat([key, value], dim=-1)[: len(slots)][used]
    cache[slots[used] // block_size, :, slots[used] % block_size] = states
    for row, length in enumerate(lens.tolist()):
        first, last = starts[row : row + 2].tolist()
        if length == 0 or first == last:
            output[first:last] = 0
            continue
        at = torch.arange(length)
        states = cache[table[row][at // block_size].long(), :, at % block_size]
        states = states.repeat_interleave(query.shape[1] // cache.shape[1], dim=1)
        keys, values = states[..., :size], states[..., size:]
        scores = scale * torch.einsum("qhd,khd->hqk", query[first:last], keys)
        places = length - (last - first) + torch.arange(last - first)
        scores.masked_fill_(at[None, None, :] > places[None, :, None], -torch.inf)
        output[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


class StandInAttention(FusedStepAttentionBackend):
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float32", "bfloat16"]

    @staticmethod
    def get_impl_cls() -> type[FusedStepAttentionImpl]:
        return StandInAttentionImpl


class LaunchedNative:
    """The native step operations as kernels: bound to fixed addresses, run when it is their turn.

    With the scratch of Triton's, so that memory is counted as on a GPU. Its top-k is its own.
    """

    allocate_scratch = staticmethod(TritonStep.allocate_scratch)

    def __init__(self, state: Any, scratch: Any = None, truncation: Any = None) -> None:
        parts = (state.requests, state.sampling, state.stop, state.inputs, state.grammar)
        for part in filter(None, parts):
            readable(vars(part).values())
        with running():
            self.native = native.NativeStep(state)

    def prepare(self, rows: Any, num_reqs: int) -> None:
        enqueue(lambda: self.native.prepare(rows, num_reqs))

    def step(self, logits: Any, rows: Any, num_reqs: int, needs: Any) -> None:
        enqueue(lambda: self.native.step(logits, rows, num_reqs, needs))

    def sample(self, logits: Any, rows: Any, num_reqs: int, needs: Any) -> None:
        enqueue(lambda: self.native.sample(logits, rows, num_reqs, needs))

    def constrain(self, logits: Any, rows: Any, num_reqs: int) -> None:
        enqueue(lambda: self.native.constrain(logits, rows, num_reqs))

    def follow(self, rows: Any, num_reqs: int) -> None:
        enqueue(lambda: self.native.follow(rows, num_reqs))


class UvaBuffer:
    """vLLM's for CUDA, which its CPU worker replaces: pinned, with a view of the device."""

    def __init__(self, size: Any, dtype: torch.dtype) -> None:
        self.cpu = torch.zeros(size, dtype=dtype, device="cpu", pin_memory=True)
        self.np = self.cpu.numpy()
        self._uva = GPU.view_of_pinned(self.cpu)

    def uva(self, n: int | None = None) -> torch.Tensor:
        return self._uva if n is None else self._uva[:n]


def async_tensor_h2d(data: Any, device: Any = None, dtype: Any = None, out: Any = None) -> Any:
    """vLLM's for CUDA, which its CPU worker replaces."""
    dtype = dtype or (None if out is None else out.dtype)
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data)
    if not isinstance(data, torch.Tensor):
        pinned = torch.tensor(data, dtype=dtype, device="cpu", pin_memory=True)
    else:
        dtype = dtype or data.dtype
        pinned = torch.empty(data.shape, dtype=dtype, device="cpu", pin_memory=True).copy_(data)
    if out is not None:
        return out.copy_(pinned, non_blocking=True)
    return pinned.to(device, non_blocking=True)


def python_ops() -> dict[str, Any]:
    from vllm.model_executor.layers.attention import attention
    from vllm.model_executor.layers.mamba import mamba_mixer2, short_conv
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    names = {
        "unified_attention_with_output": attention,
        "unified_kv_cache_update": attention,
        "mamba_mixer2": mamba_mixer2,
        "short_conv": short_conv,
        "cpu_gdn_attention_core": gdn_attention,
    }
    return {f"vllm::{name}": getattr(module, name) for name, module in names.items()}


def runner_class() -> Any:
    """FusedStepRunner whose every call happens on the device."""
    from fusedstep.vllm_plugin.runner.runner import FusedStepRunner

    ops = python_ops()

    class Counted(FusedStepRunner.__base__):  # type: ignore[misc, name-defined]
        """vLLM's, below ours. ``stock_bytes``: what it makes beside the KV cache, after it has
        measured its memory: block tables, the attention's scratch."""

        def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
            before = GPU.live_bytes()
            super().initialize_kv_cache(*args, **kwargs)
            if not hasattr(self, "stock_bytes"):  # the first time nothing is replaced
                self.stock_bytes = GPU.live_bytes() - before - memory_of(self.kv_caches)
            if self.aux_output_connector is not None:  # which asks vLLM's platform for the device
                GPU.adopt(self.aux_output_connector._capturer.device_buffer)

    class StandInRunner(FusedStepRunner, Counted):
        def __init__(self, vllm_config: Any, device: torch.device) -> None:
            with on_device(ops):
                super().__init__(vllm_config, CUDA)

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            with on_device(ops):
                super().load_model(*args, **kwargs)
            drafter = getattr(self.speculator, "model", None)
            for model in (self.model, *([] if drafter is None else [drafter])):
                for tensor in (*model.parameters(), *model.buffers()):
                    GPU.adopt(tensor)
            forward = self.model.forward

            def checked(*args: Any, **kwargs: Any) -> Any:
                assert torch.is_inference_mode_enabled(), "outside inference mode"
                return forward(*args, **kwargs)

            self.model.forward = checked

    for name in (
        "profile_run",
        "initialize_kv_cache",
        "capture_model",
        "profile_cudagraph_memory",
        "execute_model",
        "sample_tokens",
        "use_form",
    ):

        def method(self: Any, *args: Any, name: str = name, **kwargs: Any) -> Any:
            with on_device(ops):
                return getattr(super(StandInRunner, self), name)(*args, **kwargs)

        setattr(StandInRunner, name, method)
    return StandInRunner


def install() -> None:
    """In a process that will have one engine: what vLLM's CPU worker has replaced is CUDA's."""
    import sys

    import vllm.v1.worker.cpu_worker  # noqa: F401
    import vllm.v1.worker.gpu.buffer_utils as buffers
    from vllm.utils import torch_utils
    from vllm.v1.sample.ops import topk_topp_sampler

    if "pin_memory" in vars(torch.Tensor):
        del torch.Tensor.pin_memory
    graphs.install()
    buffers.UvaBuffer = UvaBuffer
    truncate = topk_topp_sampler.apply_top_k_top_p_pytorch  # on a CPU it asks for the largest k
    topk_topp_sampler.apply_top_k_top_p_pytorch = lambda logits, k, p, **_: truncate(logits, k, p)
    replaced = {
        "async_tensor_h2d": async_tensor_h2d,
        "current_stream": lambda *_: GPU.current,
        "weak_ref_tensor": lambda tensor: tensor,  # the recorded work has it, too
    }
    for name, value in replaced.items():
        of_cpu = vars(torch_utils)[name]
        for module in [m for n, m in sys.modules.items() if n.startswith("vllm.")]:
            if vars(module).get(name) is of_cpu:
                setattr(module, name, value)


def worker_class() -> Any:
    """Imported by name: ``standin.engine.StandInWorker``."""
    from vllm.v1.worker.gpu.warmup import warmup_kernels
    from vllm.v1.worker.workspace import init_workspace_manager

    from fusedstep.ops import dispatch
    from fusedstep.vllm_plugin.runner import runner
    from fusedstep.vllm_plugin.worker import FusedStepWorker
    from fusedstep.window import recorder

    install()
    recorder.Driver = graphs.Driver
    recorder.no_while_reason = lambda: None
    runner.FusedStepRunner = runner_class()
    runner.allocate_buffers = lambda *_: None  # vLLM's kernels do not run in the interpreter
    dispatch.resolve = lambda *_: dispatch.Choice("triton", "the stand-in")
    dispatch.load = lambda _: LaunchedNative if SETTINGS["ops"] == "native" else TritonStep
    GPU.current = torch.cuda.Stream()

    class StandInWorker(FusedStepWorker):
        """In the order of vLLM's GPU worker."""

        def init_device(self) -> None:
            super().init_device()
            init_workspace_manager(CUDA)

        def determine_available_memory(self) -> int:
            self.model_runner.profile_run()
            self.profiled = GPU.live_bytes()  # what vLLM sees of what stays
            self.graph_bytes = 0
            if SETTINGS["cudagraph_mode"] != "NONE":
                self.graph_bytes = self.model_runner.profile_cudagraph_memory()
            return int(super().determine_available_memory())

        def compile_or_warm_up_model(self) -> Any:
            times = super().compile_or_warm_up_model()
            warmup_kernels(self.model_runner, self.execute_model, self.sample_tokens)
            if SETTINGS["cudagraph_mode"] != "NONE":
                self.captured_bytes = self.model_runner.capture_model()
            return times

    return StandInWorker


def __getattr__(name: str) -> Any:
    if name == "StandInWorker":
        globals()[name] = made = worker_class()
        return made
    raise AttributeError(name)
