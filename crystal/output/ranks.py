"""Which of a run's processes this one is: known before torch is imported, and after they have met."""

from __future__ import annotations

import datetime
import os
import sys

from crystal.output.imported import imported


def rank() -> int:
    """From 0; in a process group that somebody joined without torchrun's environment, the group's number."""
    if in_group():
        return sys.modules["torch.distributed"].get_rank()
    return int(os.environ.get("RANK", "0"))


def has_launcher() -> bool:
    """Whether torchrun, or what sets the same variables, started this process."""
    return "RANK" in os.environ


def in_group() -> bool:
    """Whether this process has joined a process group."""
    distributed = imported("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def is_said_by_the_first(line: str, seconds: float = 3.0) -> bool:
    """Whether the group's first process ends with the same words; asked by each that ends with a mistake.

    A mistake of its own is told by who made it, one that all make by the first alone. seconds: how long the others
    wait for the first, which may have no mistake to tell.
    """
    if not in_group():
        return False
    group = sys.modules["torch.distributed"]
    said = f"crystal/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store = group.distributed_c10d._get_default_store()
        if group.get_rank() == 0:
            store.set(said, line)
            return True
        store.wait([said], datetime.timedelta(seconds=seconds))
        return store.get(said).decode() == line
    except RuntimeError as error:  # nothing was said; or the first has ended, and taken the store along
        return isinstance(error, group.DistNetworkError)


def is_first() -> bool:
    """Whether this is the process that speaks and writes: alone, or the first of those that torchrun started."""
    return rank() == 0
