"""The memory of one launch: copies of all tensors that its arguments lead to, end to end."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ALIGNMENT = 128  # at least a cache line: no line holds bytes of two tensors


@dataclass(frozen=True)
class Named:
    """A tensor among the arguments, by the path to it."""

    name: str
    start: int  # offset in the arena
    stop: int
    itemsize: int


def tensors_of(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in an argument: of a tuple by index, of a named tuple by field."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        fields = getattr(value, "_fields", [str(index) for index in range(len(value))])
        for field, item in zip(fields, value, strict=True):
            yield from tensors_of(f"{name}.{field}", item)


class Arena:
    """Bytes that stand for the tensors' memory while a launch runs.

    An access outside of every tensor is an error, whatever lies there in the process.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        found = [pair for name, value in arguments.items() for pair in tensors_of(name, value)]
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for _, tensor in found
            if tensor.untyped_storage().nbytes()
        }
        self._bases = np.array(sorted(storages), dtype=np.int64)
        self._sizes = np.array([storages[int(base)] for base in self._bases], dtype=np.int64)
        room = -(-self._sizes // ALIGNMENT) * ALIGNMENT
        self._starts = np.cumsum(room) - room
        self.bytes = np.zeros(int(room.sum()), dtype=np.uint8)
        for start, memory in self._memory():
            self.bytes[start : start + len(memory)] = memory
        self._named = [
            Named(name, start, start + tensor.untyped_storage().nbytes(), tensor.itemsize)
            for name, tensor in found
            if tensor.numel()
            for start in [int(self.offsets(np.array([tensor.data_ptr()]), tensor.itemsize)[0])]
        ]

    def _memory(self) -> Iterator[tuple[int, np.ndarray]]:
        for base, size, start in zip(self._bases, self._sizes, self._starts, strict=True):
            memory = (ctypes.c_uint8 * int(size)).from_address(int(base))
            yield int(start), np.frombuffer(memory, dtype=np.uint8)

    def copy_back(self) -> None:
        """What the launch has written reaches the tensors."""
        for start, memory in self._memory():
            memory[:] = self.bytes[start : start + len(memory)]

    def offsets(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """Offsets [n] int64 of the bytes at ``addresses``."""
        addresses = addresses.astype(np.int64)
        storage = np.searchsorted(self._bases, addresses, side="right") - 1
        distance = addresses - self._bases[storage]
        outside = (storage < 0) | (distance + itemsize > self._sizes[storage])
        if outside.any():
            raise IndexError(f"{outside.sum()} elements outside of every tensor of the launch")
        return self._starts[storage] + distance

    def cells(self, itemsize: int) -> np.ndarray:
        """The bytes as unsigned numbers: an element's index is its offset by its size."""
        return self.bytes.view(f"u{itemsize}")

    def name(self, offset: int) -> str:
        """Argument and flat index of an element, for a message."""
        named = [tensor for tensor in self._named if tensor.start <= offset < tensor.stop]
        if not named:
            return f"byte {offset}"
        tensor = max(named, key=lambda tensor: tensor.start)
        return f"{tensor.name}[{(offset - tensor.start) // tensor.itemsize}]"
