"""`crystal runs`: which runs there are below a directory, and how each stands. Reads files only, and only their ends.

Whatever is missing, torn or not ours is left out or left unknown, never an error: a run may be half-written, copied or
killed at any time.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from crystal.config import parse
from crystal.config.bounded_yaml import MAX_BYTES, quick_value
from crystal.curriculum.config import CurriculumConfig
from crystal.curriculum.resolve import resolve
from crystal.errors import ConfigError, CrystalError
from crystal.files import RUN_LOCK, from_json, is_locked, open_regular, regular_bytes

DEPTH = 4  # how far below the directory runs are looked for
_FILES = ("manifest.json", "metrics.jsonl", "events.jsonl", "checkpoints")  # one of which a run has beside config.yaml
_RATE_STEPS = 20  # the last steps whose median speed counts


@dataclass(frozen=True)
class RunState:
    """How a run stands. None: not known."""

    path: Path
    name: str
    state: str  # training, finished, stopped, interrupted, failed or not started
    step: int
    steps: int | None  # of the whole curriculum
    checkpoint_step: int | None  # the newest checkpoint
    tokens: int | None
    loss: float | None  # of the last step recorded
    val_loss: dict[str, float]  # by source, as last measured
    tokens_per_second: float | None
    seconds_left: float | None  # of a run that is training: to where this start of it stops
    disk_bytes: int
    last_activity: float | None  # seconds since 1970
    backend: str | None
    dtype: str | None

    @property
    def mean_val_loss(self) -> float | None:
        """The mean over the sources."""
        return statistics.fmean(self.val_loss.values()) if self.val_loss else None


def find_runs(directory: Path) -> list[RunState]:
    """The runs in or below a directory, that with the latest sign of life first. Raises ConfigError if it isn't one."""
    if not directory.is_dir():
        what = "no such directory" if not directory.exists() else "expected a directory"
        raise ConfigError(f"{directory}: {what}", file=directory)
    found = [state for path in _run_directories(directory, DEPTH, set()) if (state := run_state(path))]
    return sorted(found, key=lambda run: (-(run.last_activity or 0), str(run.path)))


def _run_directories(directory: Path, depth: int, seen: set) -> Iterator[Path]:
    """seen: device and inode of the directories looked into, which links may lead to again."""
    try:
        where = os.stat(directory)
        if (where.st_dev, where.st_ino) in seen:
            return
        seen.add((where.st_dev, where.st_ino))
        with os.scandir(directory) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        names = {entry.name for entry in found}
        if "config.yaml" in names and names.intersection(_FILES):
            yield directory
        elif depth:
            for entry in found:
                if entry.is_dir() and not entry.name.startswith("."):
                    yield from _run_directories(directory / entry.name, depth - 1, seen)
    except OSError:  # closed to us, or gone meanwhile
        return


def run_state(directory: Path) -> RunState | None:
    """How the run in a directory stands; None where its config.yaml is whole and not a run's."""
    config = read_config(directory)
    if config is not None and not isinstance(config.get("curriculum"), dict):
        return None
    config = config or {}
    steps, tokens_per_step = _curriculum(config, directory)
    metrics = tail(directory / "metrics.jsonl", "val_loss")
    events = tail(directory / "events.jsonl", "start")
    checkpoint = _newest_checkpoint(directory)
    recorded = [r for r in metrics if whole(r.get("step")) is not None]
    step = recorded[-1]["step"] if recorded else checkpoint or 0
    rates = [v for r in recorded[-_RATE_STEPS:] if (v := number(r.get("tokens_per_second")))]
    rate = statistics.median(rates) if rates else None
    started = next((i for i in reversed(range(len(events))) if events[i].get("event") == "start"), None)
    since = {str(e.get("event")): e for e in (events if started is None else events[started:])}
    state = _state(directory, since, bool(recorded or events or checkpoint), step, steps, checkpoint)
    goal = whole(since.get("start", {}).get("stop")) or steps
    left = max(goal - step, 0) * tokens_per_step / rate if rate and goal and tokens_per_step else None
    backend = config.get("backend") if isinstance(config.get("backend"), dict) else {}
    name = config.get("name")
    return RunState(
        path=directory,
        name=name if isinstance(name, str) else directory.name,
        state=state,
        step=step,
        steps=steps,
        checkpoint_step=checkpoint,
        tokens=next((t for r in reversed(recorded) if (t := whole(r.get("tokens"))) is not None), None),
        loss=next((v for r in reversed(recorded) if (v := number(r.get("loss"))) is not None), None),
        val_loss=next((v for r in reversed(recorded) if (v := losses(r.get("val_loss")))), {}),
        tokens_per_second=rate,
        seconds_left=left if state == "training" else None,
        disk_bytes=_bytes_of(directory),
        last_activity=_last_activity(directory),
        backend=backend.get("name"),
        dtype=backend.get("dtype") or _computed_in(since.get("start", {})),
    )


def _computed_in(start: dict) -> str | None:
    """The dtype of a run whose config leaves it to the backend, as its start recorded it."""
    return start["backend"].get("compute_dtype") if isinstance(start.get("backend"), dict) else None


def _state(directory: Path, since: dict, begun: bool, step: int, steps: int | None, checkpoint: int | None) -> str:
    """since: the events of the last start, by kind."""
    if is_held(directory):
        return "training"
    if not begun:
        return "not started"
    stopped = "stop" in since
    if steps is not None and step >= steps and (stopped or not since or (checkpoint or 0) >= steps):
        return "finished"
    if "interrupted" in since:
        return "interrupted"
    return "stopped" if stopped or not since else "failed"  # without a word: killed, or an error


def is_held(directory: Path) -> bool:
    """Whether a process trains in a run directory: it holds the lock that `alone_in` takes."""
    return is_locked(directory / RUN_LOCK)


def read_config(directory: Path) -> dict | None:
    """A run's config.yaml as a mapping; None where it cannot be read, is empty or torn."""
    try:
        config = quick_value(regular_bytes(directory / "config.yaml", MAX_BYTES).decode())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None if config is None else {}


def _curriculum(config: dict, directory: Path) -> tuple[int | None, int | None]:
    """(steps of all stages, tokens of a step)."""
    try:
        curriculum = resolve(parse(CurriculumConfig, config.get("curriculum"), str(directory), ("curriculum",)))
    except CrystalError:
        return None, None
    return curriculum.steps, curriculum.global_batch_size * curriculum.seq_len


def tail(path: Path, mark: str) -> list[dict]:
    """The last records of a .jsonl file, oldest first, and of those before them the ones with the word `mark`.

    Reads back to such a one, at most a MiB.
    """
    word = f'"{mark}"'.encode()
    try:
        with open_regular(path) as file:
            end = file.seek(0, os.SEEK_END)
            for size in (1 << 16, 1 << 20):
                file.seek(max(0, end - size))
                lines = file.read().split(b"\n")[0 if size >= end else 1 :]
                if size >= end or any(word in line and parse_record(line) for line in lines):
                    break
    except OSError:
        return []
    recent = len(lines) - 2 * _RATE_STEPS
    kept = (line for i, line in enumerate(lines) if i >= recent or word in line)
    return [record for line in kept if (record := parse_record(line))]


def parse_record(line: bytes | str) -> dict | None:
    """A line of a .jsonl file as a mapping; None for a torn or foreign one."""
    try:
        record = from_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def number(value: Any) -> float | None:
    """A finite number that a double can hold, or None."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and -1e300 < value < 1e300 else None


def losses(value: Any) -> dict[str, float]:
    """Finite losses by source."""
    return {s: v for s, v in value.items() if number(v) is not None} if isinstance(value, dict) else {}


def whole(value: Any) -> int | None:
    """A step or a number of tokens, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 else None


def _newest_checkpoint(directory: Path) -> int | None:
    """The step of the newest sealed checkpoint, as crystal.checkpoint names them."""
    found = (
        re.fullmatch(r"step-(\d{7,})", p.parent.name) for p in directory.glob("checkpoints/step-*/checkpoint.json")
    )
    return max((int(match[1]) for match in found if match), default=None)


def _bytes_of(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for file in files:
            with contextlib.suppress(OSError):  # a checkpoint that is being replaced
                total += os.lstat(os.path.join(folder, file)).st_size
    return total


def _last_activity(directory: Path) -> float | None:
    times = []
    for name in ("metrics.jsonl", "events.jsonl", "config.yaml"):
        with contextlib.suppress(OSError):
            times.append((directory / name).stat().st_mtime)
    return max(times, default=None)


def as_dict(runs: list[RunState]) -> dict:
    """All runs, JSON-ready; times as UTC."""
    return {"runs": [_run_dict(run) for run in runs]}


def _run_dict(run: RunState) -> dict:
    active = run.last_activity
    return asdict(run) | {
        "path": str(run.path),
        "mean_val_loss": run.mean_val_loss,
        "last_activity": None if active is None else
        datetime.datetime.fromtimestamp(active, datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
