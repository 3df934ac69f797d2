"""A window's result for the host: tokens and logprobs of its steps, read once at its end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fusedstep.ops.types import WindowRows
from fusedstep.window.pinned import host_zeros


class WindowBuffers:
    """Two copies of a window's result: on the device, so that the next window may reuse its rows,
    and in pinned memory for the host.

    The logprobs' buffers grow to the largest asked for; column 0 is the sampled token. Where device
    memory is host memory the host reads the device's side.
    """

    def __init__(self, max_steps: int, max_num_reqs: int, device: torch.device) -> None:
        self.device = device
        self._host: dict[str, torch.Tensor] = {}
        self.num_sampled = self._buffer("num_sampled", (max_num_reqs,), torch.int32)  # [B]
        self.out_tokens = self._buffer("out_tokens", (max_steps, max_num_reqs), torch.int64)
        self._reserve_logprobs((0, 0, 1))
        # A thread that waits for a window sleeps: K steps of spinning would be a core.
        self._ready = torch.cuda.Event(blocking=True) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def reserve_logprobs(self, num_steps: int, num_reqs: int, num_logprobs: int) -> None:
        """Room for one window; allocates only when a window asks for more than any before."""
        wanted = (num_steps, num_reqs, 1 + num_logprobs)
        shape = tuple(max(s) for s in zip(self.token_ids.shape, wanted, strict=True))
        if shape != self.token_ids.shape:
            self._reserve_logprobs(shape)

    def _reserve_logprobs(self, shape: tuple[int, ...]) -> None:
        self.token_ids = self._buffer("token_ids", shape, torch.int64)  # [K, B, 1 + n]
        self.logprobs = self._buffer("logprobs", shape, torch.float32)  # [K, B, 1 + n]
        self.ranks = self._buffer("ranks", shape[:2], torch.int64)  # [K, B]

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.zeros(shape, dtype=dtype, device=self.device)
        pinned = self.device.type == "cuda"
        self._host[name] = host_zeros(*shape, dtype=dtype, pinned=True) if pinned else buffer
        return buffer

    def keep(
        self,
        rows: WindowRows,
        steps: int,  # that were enqueued
        stream: torch.cuda.Stream | None,
        *,
        logprobs: bool,  # asked for: they lie in these buffers already,
        sampled_alone: bool,  # or, those of the sampled tokens, with the window's rows
    ) -> None:
        """The window's work is enqueued: keep its result, and bring it to the host on ``stream``.

        Whole leading parts are copied: they are contiguous, so that no copy waits.
        """
        names = ["num_sampled", "out_tokens"]
        self.num_sampled.copy_(rows.num_sampled)
        self.out_tokens[:steps].copy_(rows.out_tokens[:steps])
        if sampled_alone:
            n = self.ranks.shape[1]
            self.token_ids[:steps, :, 0] = rows.out_tokens[:steps, :n]
            self.logprobs[:steps, :, 0] = rows.out_logprobs[:steps, :n]
            self.ranks[:steps] = rows.out_ranks[:steps, :n]
        if logprobs:
            names += ["token_ids", "logprobs", "ranks"]
        if stream is None:
            assert self._ready is None, "the result of a GPU comes on a stream"
            return
        assert self._ready is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for name in names:
                size = len(self.num_sampled) if name == "num_sampled" else steps
                self._host[name][:size].copy_(getattr(self, name)[:size], non_blocking=True)
            self._ready.record()

    def read(self, num_reqs: int, steps: int, num_logprobs: int) -> WindowTokens:
        """Wait for the copies; the result has memory of its own."""
        if self._ready is not None:
            self._ready.synchronize()
        host = {name: part.numpy() for name, part in self._host.items()}
        num_sampled = host["num_sampled"][:num_reqs].copy()
        token_ids = host["out_tokens"][:steps, :num_reqs].T.tolist()
        for tokens, count in zip(token_ids, num_sampled.tolist(), strict=True):
            del tokens[count:]
        if num_logprobs < 0:
            return WindowTokens(token_ids, num_sampled, None, None, None)
        emitted = np.arange(steps)[None, :] < num_sampled[:, None]  # [num_reqs, steps]
        batch, width = np.s_[:steps, :num_reqs], np.s_[:, : 1 + num_logprobs]
        return WindowTokens(
            token_ids,
            num_sampled,
            host["token_ids"][batch].swapaxes(0, 1)[emitted][width],
            host["logprobs"][batch].swapaxes(0, 1)[emitted][width],
            host["ranks"][batch].swapaxes(0, 1)[emitted],
        )


@dataclass(frozen=True)
class WindowTokens:
    """Host copy of a window's result, by batch_idx; row b has ``num_sampled[b]`` valid steps."""

    token_ids: list[list[int]]  # ragged [num_reqs, num_sampled]
    num_sampled: np.ndarray  # [num_reqs] int32
    logprob_token_ids: np.ndarray | None  # [sum(num_sampled), 1 + n] int64, request-major
    logprobs: np.ndarray | None  # [sum(num_sampled), 1 + n] float32
    ranks: np.ndarray | None  # [sum(num_sampled)] int64

    @property
    def num_steps(self) -> int:
        """Steps of the window that gave a token."""
        return int(self.num_sampled.max(initial=0))
