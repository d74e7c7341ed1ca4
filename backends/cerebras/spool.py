"""Batches between the two processes: one .npz file a step in a directory, whole when it is there.

A step's rows are made by the run's own loop and are read by Cerebras' input function, which on CSX runs on the
cluster's worker nodes: a directory both can see is what all of them share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crystal.files import replacing

PATIENCE = 0.002  # seconds between looks for the next step


class Ended(Exception):
    """The owner of the directory wants no more steps now."""


def put(directory: Path, step: int, arrays: dict[str, np.ndarray]) -> None:
    """Hand over a step's batch."""
    with replacing(_file(directory, step), durable=False) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)


def end(directory: Path, step: int) -> None:
    """Say that instead of `step` nothing comes."""
    _file(directory, step).with_suffix(".end").touch()


def drop(directory: Path, step: int) -> None:
    """Take a step's files away, if they are there."""
    for suffix in (".npz", ".end"):
        _file(directory, step).with_suffix(suffix).unlink(missing_ok=True)


def take(directory: Path, step: int, owner: int | None) -> dict[str, np.ndarray]:
    """A step's batch, waited for. Raises Ended when none will come, or when the parent process is not `owner`."""
    file = _file(directory, step)
    while not file.exists():
        if file.with_suffix(".end").exists() or (owner is not None and os.getppid() != owner):
            raise Ended
        time.sleep(PATIENCE)
    with np.load(file) as arrays:
        return dict(arrays)


def batches(
    directory: Path, first: int, owner: int | None, rank: int = 0, ranks: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of step `first` and on; of each the `rank`-th of `ranks` equal parts of its rows."""
    step = first
    while True:
        arrays = take(directory, step, owner)
        rows = len(arrays["ids_BT"]) // ranks
        yield {key: value[rank * rows : (rank + 1) * rows] for key, value in arrays.items()}
        step += 1


def _file(directory: Path, step: int) -> Path:
    return Path(directory) / f"step-{step:07d}.npz"
