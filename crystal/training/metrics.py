"""The record of a run: metrics.jsonl, a line a step, and events.jsonl, a line an event. TensorBoard is a reader.

A line is flushed when it is written, so a killed run loses at most a torn last line. Resuming at a step drops what
was recorded after it: those steps are about to be made again, bit for bit.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path


class Metrics:
    """Appends to a run's metrics.jsonl and mirrors the numbers to TensorBoard."""

    def __init__(self, run_dir: Path, resume_step: int | None):
        """resume_step: the last step to keep, or None for a run that starts."""
        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            _keep(self.path, -1 if resume_step is None else resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter  # slow import, and only training needs it

        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=(resume_step or 0) + 1)

    def write(self, record: dict) -> None:
        """Record one step; numbers that are not finite become null, nested mappings TensorBoard tags `key/source`."""
        record = _finite(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for key, value in record.items():
            if isinstance(value, dict):
                for source, number in value.items():
                    if number is not None:
                        self._board.add_scalar(f"{key}/{source}", number, record["step"])
            elif key not in ("step", "stage") and isinstance(value, int | float):
                self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


class NoMetrics:
    """What the processes write that do not write."""

    def write(self, record: dict) -> None:
        pass

    def close(self) -> None:
        pass


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run_dir: Path) -> Iterator[dict]:
    """The records of a run, in order; a torn line is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _keep(path: Path, last_step: int) -> None:
    """Drop every record after `last_step`, atomically."""
    aside = path.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(r) + "\n" for r in read_metrics(path.parent) if r["step"] <= last_step)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(path)


def event(run_dir: Path, kind: str, **details) -> None:
    """Append one line to events.jsonl: what happened, when (UTC), and the details."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with (run_dir / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": now, "event": kind, **details}) + "\n")
