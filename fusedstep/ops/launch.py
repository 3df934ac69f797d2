"""One launch of a Triton kernel, as data: it can be called, compiled or put on a tape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Applies top-k and top-p: masks logits [n, V] float32 in place with -inf, given k [n] int32 (V
# is none) and p [n] float32 (1 is none). It may neither synchronise nor allocate what it uses
# again: it is recorded.
Truncation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Launch:
    """One kernel launch; ``args`` and ``constexprs`` are by the kernel's parameter names."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    # Unless it is told how many registers a thread may have, NVIDIA's assembler spills a few bytes
    # to reach an occupancy of its own choice.
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Compiler options on this machine's kind of GPU."""
        options = {"num_warps": self.num_warps}
        if self.max_registers is not None and torch.version.hip is None:
            options["maxnreg"] = self.max_registers
        return options

    def __call__(self) -> None:
        self.kernel[self.grid](**self.args, **self.constexprs, **self.options)
