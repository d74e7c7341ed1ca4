"""How long torchrun must wait after a stop signal, so that a run can end its step and save: --shutdown-timeout."""

from __future__ import annotations

import math
import os
import tempfile
import time
from pathlib import Path

from crystal.training.patience import needed_seconds

CHECKPOINT_BYTES = 12  # a parameter: weights and two moments, fp32
TAKES_LONGER = 2.0  # times a rate that was measured on a quiet machine: all processes write at once
_SAMPLE, _PIECE = 64 << 20, 8 << 20


def grace_seconds(checkpoint_bytes: float, bytes_per_second: float, step_seconds: float) -> int:
    """Seconds from the stop signal to the end, at the worst: a step has just begun, and is followed by a save.

    checkpoint_bytes, bytes_per_second: of what is written together, by all processes onto one file system or by one
    onto its own. Never less than torchrun's own 30. Raises ValueError for a rate that is none.
    """
    if not bytes_per_second > 0 or not math.isfinite(bytes_per_second):
        raise ValueError(f"bytes_per_second: expected a rate above 0, got {bytes_per_second}")
    return needed_seconds(step_seconds, TAKES_LONGER * checkpoint_bytes / bytes_per_second)


def disk_bytes_per_second(directory: Path) -> float | None:
    """What the disk under a directory, or under the nearest above it that exists, takes; None where nothing can be
    written. A file of 64 MB is written, synced and removed."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())
    piece = os.urandom(_PIECE)  # nothing that could be written as a hole or compressed
    try:
        with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
            began = time.perf_counter()
            for _ in range(_SAMPLE // _PIECE):
                file.write(piece)
            os.fsync(file.fileno())
            return _SAMPLE / (time.perf_counter() - began)
    except OSError:
        return None
