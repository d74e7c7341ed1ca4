"""Sums over executors (SwarmX's role): each has its own store and rows, and all make the same update."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from crystal.backends.base import started_processes


def join_executors() -> None:
    """Meet the other processes that torchrun started, if it did."""
    if started_processes() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def executors() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if executors() > 1 else 0


def largest_over_executors(*numbers: int) -> tuple[int, ...]:
    """Each number's largest; all meet here."""
    if executors() == 1:
        return numbers
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def summed_over_executors(*tensors: Tensor) -> list[Tensor]:
    """What a step or a validation reports, [] or [S] each, of all executors' rows: added up in fp64, in one exchange.

    Every number that is reported goes through here, so that none is of one executor's rows alone.
    """
    if executors() == 1:
        return list(tensors)
    together = torch.cat([tensor.double().flatten() for tensor in tensors])
    dist.all_reduce(together)
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def sum_over_executors_(tensor: Tensor) -> Tensor:
    """Add up `tensor` in place over all executors, in the same order in each: their weights stay the same bits."""
    if executors() > 1:
        dist.all_reduce(tensor)
    return tensor
