"""The GPU that a kernel is compiled for; none of these in the interpreter."""

from __future__ import annotations

import triton.language as tl
from triton.runtime.jit import constexpr_function


@constexpr_function
def is_cuda():
    target = tl.target_info.current_target()
    return target is not None and target.backend == "cuda"


@constexpr_function
def is_gfx9():
    target = tl.target_info.current_target()
    return target is not None and target.backend == "hip" and target.arch.startswith("gfx9")
