"""The checkpoint that an import makes: whole, or not there and nothing left aside."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from crystal.checkpoint import aside_of, write
from crystal.files import alone_at, writing


def write_new(to: Path, tensors: Iterable[tuple[str, Tensor]], state: dict, files: Iterable[Path] = ()) -> None:
    """`checkpoint.write`, by one process at a time. Raises RunError where another is writing it or the place cannot be
    written, and what the tensors' reader raises."""
    with writing(to), alone_at(to):
        try:
            write(to, tensors, state, files)
        except BaseException:
            shutil.rmtree(aside_of(to), ignore_errors=True)
            raise
