"""Who runs a sweep's trials: worker processes that each take the next one until there are none.

A sweep that was killed anywhere goes on where it was: what was finished stays, what was running is run again.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from crystal.checkpoint.seal_file import DIGEST, digest_of, with_digest
from crystal.config import Strict, parse
from crystal.errors import ConfigError, CrystalError, RunError
from crystal.files import from_json, reason, regular_bytes, write_whole
from crystal.output.interrupts import finishing, shielded
from crystal.sweeps.store import open_trials
from crystal.sweeps.sweep import Sweep, family, name_from
from crystal.sweeps.trial import Point, run_trial
from crystal.training.guards import alone_in

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

Hex = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FORMAT = 2  # of sweep.json and what trials.sqlite holds; 1 did not say what made a trial
MAX_RECORD = 1 << 22  # bytes of sweep.json; those of the packaged sweeps have 3,000


class _Corpus(Strict):
    name: str
    fingerprint: Hex


class _Record(Strict):
    """What sweep.json says."""

    format: int
    dtype: Literal["bf16", "fp32"]
    fingerprint: Hex
    corpus: _Corpus
    config: dict


@contextmanager
def held(sweep: Sweep) -> Iterator[None]:
    """Make the sweep's directory, hold it for this process, and record the sweep in it.

    Raises RunError when the directory cannot be written, is held by another process, or is no sweep's.
    """
    directory, _ = sweep.directory, sweep.data  # prepared first: it may take long, or fail
    make_directory(directory)
    with ExitStack() as stack:
        try:
            stack.enter_context(alone_in(directory))
            if (directory / "sweep.json").exists():
                read_record(directory)
            write_whole(directory / "sweep.json", json.dumps(_record(sweep), indent=1) + "\n")
        except OSError as error:
            raise RunError(f"{directory}: cannot be written: {error.strerror}") from None
        yield


def make_directory(directory: Path) -> None:
    """Make a directory for results, unless it is there. Raises RunError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"{directory}: expected a directory, but it is a file") from None
    except OSError as error:
        raise RunError(f"{directory}: cannot be written: {error.strerror}") from None


def _record(sweep: Sweep) -> dict:
    """What sweep.json says: enough to judge the trials again without the sweep's file or its data."""
    config = sweep.config.model_dump(mode="json")
    config["run"] = name_from(sweep.directory, sweep.run.path)
    if sweep.target:
        config["target"]["run"] = name_from(sweep.directory, sweep.target.path)
    return with_digest(
        {
            "format": FORMAT,
            "dtype": sweep.dtype,
            "fingerprint": sweep.fingerprint(),
            "corpus": sweep.data["corpus"],
            "config": config,
        }
    )


def read_record(directory: Path) -> dict:
    """sweep.json of a directory. Raises RunError for one that is missing, damaged, or of another format."""
    file = directory / "sweep.json"
    try:
        record = from_json(regular_bytes(file, MAX_RECORD).decode())
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {reason(error)}", file=file) from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise RunError(
            f"{file}: damaged: expected JSON, {error}; move it away and the same command goes on with the trials"
        ) from None
    if isinstance(record, dict) and "decides" in record:
        raise RunError(
            f"{directory}: holds the trials of an older crystal, which did not record all that made them; "
            f"use another --out"
        )
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RunError(f"{file}: expected the record of a sweep, format {FORMAT}; use another --out")
    if record.pop(DIGEST, None) not in (None, digest_of(record)):  # 0.1.0 wrote none
        raise RunError(f"{file}: expected what has the {DIGEST} that is in it, the file has changed; move it away")
    try:
        parse(_Record, record, str(file))
    except ConfigError as error:
        raise RunError(f"{error}; move it away", file=file) from None
    return record


def run_sweep(sweep: Sweep, workers: int, show: Callable[[int, int, float], None]) -> None:
    """Run what is left of a sweep whose directory is held. show: is called with (finished, all, seconds left).

    Raises RunError when a worker cannot go on.
    """
    import multiprocessing
    from multiprocessing.connection import wait

    trials = open_trials(sweep)
    trials.give_up_running()
    total, began, at_start = trials.wanted(), time.time(), len(trials.finished())
    show(at_start, total, math.inf)
    if at_start == total:
        return
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    processes = [context.Process(target=_work, args=(sweep, failures), daemon=True) for _ in range(workers)]
    try:
        with shielded(), finishing():  # who is told to stop in the middle of a start would leave half a process
            for process in processes:
                process.start()
        while running := [p.sentinel for p in processes if p.is_alive()]:
            wait(running, timeout=2)
            done = len(trials.finished())
            rate = (done - at_start) / (time.time() - began)
            show(done, total, (total - done) / rate if rate else math.inf)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    if not failures.empty():
        raise RunError(failures.get())
    if len(trials.finished()) < total:
        raise RunError(f"{sweep.directory}: a worker stopped before the sweep's end; the same command goes on")


def _work(sweep: Sweep, failures: SimpleQueue) -> None:
    """One worker: take trials until there are none. A ConfigError goes to the command, which shows it once."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        trials, rows = open_trials(sweep), sweep.rows
        _, optimizer = family(sweep.config.family)
        while (claim := trials.claim()) is not None:
            point = Point(sweep.model(*claim.shape), optimizer, claim.seed, claim.values)
            trials.finish(claim, run_trial(point, sweep.length, rows, sweep.dtype))
    except CrystalError as error:
        failures.put(str(error))
        sys.exit(2)
    except OSError as error:
        failures.put(f"{error.filename or sweep.directory}: {error.strerror}")
        sys.exit(2)


def _end_with_parent() -> None:
    """End a worker whose command was killed: going on, it would finish a trial that the next command runs again."""
    import multiprocessing

    multiprocessing.parent_process().join()
    os._exit(1)
