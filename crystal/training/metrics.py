"""The record of a run: metrics.jsonl, a line a step, and events.jsonl, a line an event. TensorBoard is a reader.

A line is flushed when it is written, so a killed run loses at most a torn last line. Resuming at a step drops what
was recorded after it: those steps are about to be made again, bit for bit. A line that is damaged is left out by all
readers, with a note, stays in the file as it is, and never keeps a run from going on.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from crystal.config import load_yaml
from crystal.files import expect_regular, from_json, open_regular, replacing
from crystal.output.printable import printable_line


class Metrics:
    """Appends to a run's metrics.jsonl and mirrors the numbers to TensorBoard."""

    def __init__(self, run_dir: Path, resume_step: int | None):
        """resume_step: the last step to keep, or None for a run that starts."""
        self.path = run_dir / "metrics.jsonl"
        expect_regular(self.path)
        first = 0 if resume_step is None else resume_step + 1  # of those that are about to be made
        if self.path.exists():
            _keep(self.path, first - 1)
        self._file = self.path.open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter  # slow import, and only training needs it
        from torch.utils.tensorboard.summary import hparams

        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first)
        shown = dict.fromkeys((_TAGS["loss"], _TAGS["val_loss_mean"]), 0.0)  # the columns beside the hyperparameters
        for summary in hparams(hyperparameters(run_dir), shown)[:2]:
            self._board.file_writer.add_summary(summary)

    def write(self, record: dict) -> None:
        """Record one step; numbers that are not finite become null. A record with `val_loss` gets `val_loss_mean`,
        the mean over its sources, each counted once."""
        record = _finite(record)
        losses = [loss for loss in (record.get("val_loss") or {}).values() if loss is not None]
        if losses:
            record["val_loss_mean"] = sum(losses) / len(losses)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for key, value in record.items():
            numbers = value if isinstance(value, dict) else {"": value}
            for source, number in numbers.items():
                if key not in ("step", "stage") and isinstance(number, int | float):
                    tag = _TAGS.get(key, f"train/{key}") + (f"/{source}" if source else "")
                    self._board.add_scalar(tag, number, record["step"])
        self._board.flush()  # what a killed run leaves is as whole here as in metrics.jsonl

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Show a checkpoint's benchmark scores in TensorBoard; evals/ and events.jsonl hold them."""
        for name, value in scores.items():
            self._board.add_scalar(f"eval/{name}", value, step)
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


# TensorBoard shows tags that begin alike together; what is not named here is of training.
_TAGS = {
    "loss": "train/loss",
    "tokens_per_second": "perf/tokens_per_second",
    "val_loss": "validation/source_loss",
    "val_loss_mean": "validation/loss",
}


def hyperparameters(run_dir: Path) -> dict[str, int | float | str]:
    """What runs are told apart by in TensorBoard's table, from the run's config.yaml; {} where there is none."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return {}
    config = load_yaml(path).mapping
    model, curriculum, backend = config["model"], config["curriculum"], config["backend"]
    peak = max(piece["to"] for stage in curriculum["stages"] for piece in stage["lr"])
    found = {
        "lr": peak * curriculum["lr_scale"],
        "batch": curriculum["global_batch_size"],
        **{key: model[key] for key in ("d_model", "n_layers", "n_heads", "vocab_size")},
        "seq_len": curriculum["seq_len"],
        "parametrization": model["mup"]["parametrization"],
        "weight_decay": config["optimizer"]["weight_decay"],
        "backend": backend["name"],
        "dtype": backend.get("dtype"),
        "seed": config["train"]["seed"],
    }
    return {key: value for key, value in found.items() if value is not None}


class NoMetrics:
    """What the processes write that do not write."""

    def write(self, record: dict) -> None:
        pass

    def scores(self, step: int, scores: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run_dir: Path) -> Iterator[dict]:
    """The records of a run, in order; a torn last line is left out, and a damaged one with a note on stderr."""
    path, damaged = run_dir / "metrics.jsonl", []
    for number, line, record in _lines(path):
        if record is not None:
            yield record
        elif line.endswith(b"\n"):
            damaged.append(number)
    if damaged:
        _note_damaged(path, damaged[0], len(damaged) - 1)


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict | None]]:
    """(number from 1, line as it stands, record or None where it is none) of metrics.jsonl; nothing without a file."""
    if path.exists():
        with open_regular(path) as lines:
            for number, line in enumerate(lines, 1):
                yield number, line, _record(line)


@cache  # once in a process
def _note_damaged(path: Path, first: int, more: int) -> None:
    others = f" and {more:,} more" if more else ""
    print(
        printable_line(f"crystal: {path}: line {first}{others}: expected a step's record; left out, and kept as it is"),
        file=sys.stderr,
    )


_PLAIN = (int, float, type(None))


def _record(line: bytes) -> dict | None:
    """A line's record; None where it is damaged. What came later knows more keys, so those are taken as they are."""
    try:
        record = from_json(line.decode(), finite=True)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    numbers = [record.get(key) for key in ("loss", "lr", "grad_norm", "tokens_per_second", "tokens", "val_loss_mean")]
    for key in ("source_loss", "val_loss"):
        by_source = record.get(key, {})
        if not isinstance(by_source, dict):
            return None
        numbers += by_source.values()
    if any(type(value) not in _PLAIN or (value is not None and not -1e300 < value < 1e300) for value in numbers):
        return None
    kinds = type(record.get("stage", 1)) is int and type(record.get("applied", True)) is bool
    return record if kinds and 0 <= record["step"] < 1 << 48 else None


def _keep(path: Path, last_step: int) -> None:
    """Drop every record after `last_step`, and a torn last line, atomically; the rest stays byte for byte."""
    reached = False
    with replacing(path) as aside, aside.open("wb") as out:
        for _, line, record in _lines(path):
            if record is not None:
                reached |= record["step"] >= last_step
                keeps = record["step"] <= last_step
            else:  # after the last step it is one of those that are about to be made again
                keeps = line.endswith(b"\n") and not reached
            if keeps:
                out.write(line if line.endswith(b"\n") else line + b"\n")


def event(run_dir: Path, kind: str, **details) -> None:
    """Append one line to events.jsonl: what happened, when (UTC), and the details. A torn line before it stays one."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    expect_regular(run_dir / "events.jsonl")
    with (run_dir / "events.jsonl").open("ab+") as file:
        line = json.dumps({"time": now, "event": kind, **details}) + "\n"
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())
