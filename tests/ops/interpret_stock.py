"""Runs stock vLLM Triton kernels in Triton's interpreter: ``interpret_stock.py CASES RESULTS``.

A process of its own, because the interpreter must be switched on before vLLM is imported. CASES is
a list of (kernel, grid, args, constants), the kernel's name behind ``vllm.v1.worker.``; an argument
``("pointers", tensors)`` becomes the tensors' addresses, ``("addresses", tensors)`` too, signed.
RESULTS is the list of the arguments after each launch, or its error.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedstep.vllm_plugin.cpu import triton_stand_in as triton_cpu


def results_of(cases: list[Any], folder: Path) -> list[Any]:
    """For a test: the results of these cases; both files are in ``folder``."""
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, __file__, str(folder / "cases.pt"), str(folder / "results.pt")]
    env = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": "", "TRITON_INTERPRET": "1"}
    subprocess.run(command, env=os.environ | env, check=True, timeout=300)
    results: list[Any] = torch.load(folder / "results.pt", weights_only=False)
    return results


def as_argument(value: Any) -> Any:
    if isinstance(value, tuple) and value[0] == "pointers":
        return torch.tensor([t.data_ptr() for t in value[1]], dtype=torch.uint64)
    if isinstance(value, tuple) and value[0] == "addresses":
        return torch.tensor([t.data_ptr() for t in value[1]], dtype=torch.int64)
    return value


def log1p(x: Any) -> Any:
    """libdevice's, which the interpreter does not know."""
    from triton.language import tensor
    from triton.runtime.interpreter import TensorHandle

    return tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)


def main(cases_path: str, results_path: str) -> None:
    triton_cpu.install()
    from vllm.triton_utils import tldevice

    tldevice.log1p = log1p
    results = []
    for kernel, grid, args, constants in torch.load(cases_path, weights_only=False):
        module, _, name = ("vllm.v1.worker." + kernel).rpartition(".")
        launch = getattr(importlib.import_module(module), name)[grid]
        try:
            launch(*(as_argument(arg) for arg in args), **constants)
            results.append(args)
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    torch.save(results, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
