"""Sums over executors (SwarmX's role): each has its own store and rows, and all make the same update."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def executors() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if executors() > 1 else 0


def sum_over_executors_(tensor: Tensor) -> Tensor:
    """Add up `tensor` in place over all executors, in the same order in each: their weights stay the same bits."""
    if executors() > 1:
        dist.all_reduce(tensor)
    return tensor
