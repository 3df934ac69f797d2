"""GPUs that need not be here: Triton compiles for them, nothing is launched.

Triton compiles nothing in a process where its interpreter is switched on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from fusedstep.ops.attention import DeviceLimits
from fusedstep.ops.launch import Launch


@dataclass(frozen=True)
class Chip:
    """A GPU as Triton's target, and what decides how many programs share one of its SMs."""

    target: GPUTarget
    num_sms: int
    shared_bytes: int  # of an SM
    max_threads: int  # of an SM
    gb_per_s: float  # of the memory, by the data sheet
    ghz: float

    @property
    def is_hip(self) -> bool:
        return bool(self.target.backend == "hip")

    @property
    def limits(self) -> DeviceLimits:
        """As ``DeviceLimits.of`` would find them."""
        if self.is_hip:
            return DeviceLimits(self.num_sms, self.shared_bytes, is_hip=True)
        return DeviceLimits(self.num_sms, self.shared_bytes // 2 - 1024)

    def programs_per_sm(self, num_warps: int, registers: int, shared: int) -> int:
        """Occupancy: the programs that registers, shared memory and threads leave room for."""
        if self.is_hip:
            waves = min(512 // (-(-max(registers, 1) // 8) * 8), 8)  # of one of 4 SIMDs
            return min(4 * waves // num_warps, self.shared_bytes // max(shared, 1))
        of_warp = -(-registers // 8) * 8 * 32
        by_registers = (1 << 16) // of_warp // num_warps
        by_threads = min(self.max_threads // (32 * num_warps), 32)
        return min(by_registers, by_threads, self.shared_bytes // (shared + 1024))


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 108, 164 << 10, 2048, 2039, 1.41),  # A100 SXM
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 132, 228 << 10, 2048, 3350, 1.755),  # H100 SXM
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 148, 228 << 10, 2048, 8000, 1.85),  # B200
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 304, 64 << 10, 2048, 5300, 2.1),  # MI300X
}


class AbsentGpu(DriverBase):  # type: ignore[misc]
    """The driver that the JIT asks before it compiles; a device's number is its chip's name."""

    chip = "sm_90"

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.chip].target

    def get_current_device(self) -> str:
        return self.chip

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise AssertionError("nothing is launched or timed here")

    def get_benchmarker(self) -> Any:
        raise AssertionError("nothing is launched or timed here")


def install() -> AbsentGpu:
    """Make it Triton's device in this process."""
    driver = AbsentGpu()
    triton.runtime.driver.set_active(driver)
    return driver


def compiled(driver: AbsentGpu, chip: str, launch: Launch) -> Any:
    """The kernel as the JIT would compile it for this launch on ``chip``."""
    driver.chip = chip
    options = {
        name: number
        for name, number in launch.options.items()
        if not CHIPS[chip].is_hip or name != "maxnreg"
    }
    return launch.kernel.warmup(**launch.args, **launch.constexprs, **options, grid=launch.grid)
