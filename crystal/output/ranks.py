"""Which of a run's processes this one is: known before torch is imported, and after they have met."""

from __future__ import annotations

import os
import sys


def rank() -> int:
    """From 0; in a process group that somebody joined without torchrun's environment, the group's number."""
    if in_group():
        return sys.modules["torch.distributed"].get_rank()
    return int(os.environ.get("RANK", "0"))


def in_group() -> bool:
    """Whether this process has joined a process group."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that speaks and writes: alone, or the first of those that torchrun started."""
    return rank() == 0
