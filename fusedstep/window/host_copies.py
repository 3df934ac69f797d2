"""Buffers that a window's result is written to, and what the host reads of them."""

from __future__ import annotations

import numpy as np
import torch

from fusedstep.window.pinned import host_zeros


class HostCopies:
    """Named buffers on the device, each with a copy in pinned memory that is brought once a window.

    Where device memory is host memory the host reads the device's side.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: dict[str, torch.Tensor] = {}
        # A thread that waits for a window sleeps: K steps of spinning would be a core.
        self._ready = torch.cuda.Event(blocking=True) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros on the device; those of this name before, if any, are not read any more."""
        buffer = torch.zeros(shape, dtype=dtype, device=self.device)
        pinned = self._ready is not None
        self._host[name] = host_zeros(*shape, dtype=dtype, pinned=True) if pinned else buffer
        return buffer

    def bring(self, parts: dict[str, torch.Tensor], stream: torch.cuda.Stream | None) -> None:
        """The window's work is enqueued: copy the first rows of these buffers on ``stream``.

        Whole leading parts are contiguous, so that no copy waits.
        """
        assert (stream is None) == (self._ready is None), "the result of a GPU comes on a stream"
        if stream is None or self._ready is None:
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for name, part in parts.items():
                self._host[name][: len(part)].copy_(part, non_blocking=True)
            self._ready.record()

    def arrived(self) -> dict[str, np.ndarray]:
        """Wait for the copies. The next window that uses these buffers overwrites them."""
        if self._ready is not None:
            self._ready.synchronize()
        return {name: part.numpy() for name, part in self._host.items()}
