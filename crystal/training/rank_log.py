"""What each process of a run said and how it ended: RUN/logs/rank-NNNNN.log for people, .json for the post-mortem.

A run of one process has neither: what it says is on its terminal. The log takes what the process prints on stderr
after process 0, which alone speaks for the run, and the stacks of all threads when it crashes in C. A process that is
killed writes nothing: its record lacks an end, which is how the others and the next start know.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import io
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from crystal.backends.base import Place
from crystal.errors import CrystalError
from crystal.files import write_whole
from crystal.output import interrupts
from crystal.output.imported import imported
from crystal.training import post_mortem

LIMIT = 1 << 20  # bytes of a log at its start, and what a start adds to it


@contextlib.contextmanager
def logged(directory: Path, place: Place, step: Callable[[], int]) -> Iterator[None]:
    """Keep this process' log and record in a run's directory for the time of a block. step: the last one done.

    A process that ends with an error writes the run's post-mortem, if it knows of what the run died.
    """
    if place.processes == 1:
        yield
        return
    record = {
        "process": place.process, "processes": place.processes, "host": socket.gethostname(), "pid": os.getpid(),
        "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), "began": _now(), "step": step(), "end": None,
    }  # fmt: skip
    file = post_mortem.records(directory) / f"rank-{place.process:05d}.json"
    with _opened(file.with_suffix(".log")) as log:
        log.write(f"{post_mortem.START} {_now()} process {place.process} of {place.processes}, host {record['host']}, "
                  f"pid {record['pid']}, restart {record['restart']}, step {record['step']}\n")  # fmt: skip
        _keep(file, record)
        try:
            with _copied_stderr(log) if place.process else contextlib.nullcontext():
                yield
        except BaseException as error:
            end = _end_of(error)
            if end != "stopped":
                interrupts.end_undisturbed()
            log.write(traceback.format_exc() if end == "error" else f"{end}: {error}\n")
            _keep(file, record | {"end": end, "error": _line_of(error), "step": step()})
            if end in ("error", "lost"):
                post_mortem.write(directory)
            raise
        log.write(f"{_now()} ended after step {step()}\n")
        _keep(file, record | {"end": "done", "step": step()})


def lost_another(error: BaseException) -> bool:
    """Whether an exchange failed because another process is not there any more."""
    distributed = imported("torch.distributed")
    if distributed is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or "gloo/transport" in str(error)


def _end_of(error: BaseException) -> str:
    """mistake: a user's, which is told elsewhere. lost: another process died. stopped: by a signal. error: all else."""
    if isinstance(error, CrystalError):
        return "mistake"
    if lost_another(error):
        return "lost"
    return "error" if isinstance(error, Exception) else "stopped"


def _line_of(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, CrystalError) else f"{type(error).__name__}: {text}"[:500]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _keep(file: Path, record: dict) -> None:
    with contextlib.suppress(OSError):  # a disk that is full ends the run where it must be written, not here
        write_whole(file, json.dumps(record) + "\n")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The log, cut to its last half when it is long, taking what the interpreter says when it crashes."""
    try:
        path.parent.mkdir(exist_ok=True)
        if path.exists() and path.stat().st_size > LIMIT:
            write_whole(path, path.read_bytes()[-LIMIT // 2 :])
        log = path.open("a", encoding="utf-8", errors="replace", buffering=1)
    except OSError:
        yield io.StringIO()
        return
    with log:
        faulthandler.enable(log)
        try:
            yield log
        finally:
            faulthandler.disable()


@contextlib.contextmanager
def _copied_stderr(log: TextIO) -> Iterator[None]:
    before, sys.stderr = sys.stderr, _Copied(sys.stderr, log)
    try:
        yield
    finally:
        sys.stderr = before


class _Copied(io.TextIOBase):
    """A stream whose words go to the log as well, as many as the log takes."""

    def __init__(self, stream: TextIO, log: TextIO):
        self.stream, self.log, self.room = stream, log, LIMIT

    def write(self, text: str) -> int:
        if self.room > 0:
            self.room -= len(text)
            with contextlib.suppress(OSError):
                self.log.write(text if self.room > 0 else "\n(more was said than is kept)\n")
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()
