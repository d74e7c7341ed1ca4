"""A `crystal` command in a process that can be watched, struck and waited for.

It is forked from one that has imported torch, has one thread, runs in a directory that it is given, and keeps its cache
there.
"""

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

from dying import CONTEXT

SECONDS = 180  # of the clock, for a command of one second on a machine that does much else besides
TICK = 0.001


class Wrong(Exception):
    """A command did not do what it should: the outcome's word, and what was seen."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: negative for the signal that ended it. said: its stderr. printed: its stdout. work:
    seconds of CPU of its main thread since it began."""

    code: int
    said: str
    printed: str
    work: float

    def in_one_line(self) -> bool:
        """Whether stderr ends with the one line of the command's own, and no traceback is there. Training that was
        stopped says it on stdout, with where the run is."""
        if self.printed.endswith("; the same command continues\n"):
            return "crystal: " not in self.said and "Traceback" not in self.said
        lines = self.said.splitlines() or [""]
        own = [line for line in lines if line.startswith("crystal: ")]
        return own == lines[-1:] and "Traceback" not in self.said


class Running:
    """A command that was begun in a directory: forked from a process that has imported torch, with one thread."""

    def __init__(self, words: tuple[str, ...], directory: Path, number: int = 0) -> None:
        self.files = [directory / f"{name}-{number}" for name in ("stdout", "stderr")]
        for file in self.files:
            file.write_bytes(b"")
        # no daemon: a sweep starts processes of its own
        self.process = CONTEXT.Process(target=_command, args=(words, directory, self.files, dict(os.environ)))
        self.process.start()
        self.work, self._before, self._until = 0.0, None, time.monotonic() + SECONDS

    def goes_on(self) -> bool:
        """Look at it, after a moment. Raises Wrong where it does not come to an end."""
        time.sleep(TICK)
        if time.monotonic() > self._until:
            self.process.kill()
            raise Wrong("hang", f"no end after {SECONDS} s")
        try:
            ran, *_ = Path(f"/proc/{self.process.pid}/schedstat").read_text().split()
            if self._before is None and self._listens():
                self._before = int(ran)
            if self._before is not None:
                self.work = max(self.work, (int(ran) - self._before) / 1e9)
        except (OSError, ValueError):  # it has ended
            pass
        return self.process.is_alive()

    @property
    def began(self) -> bool:
        """Whether it was seen after it had begun to listen to signals, which the command does first of all."""
        return self._before is not None

    def _listens(self) -> bool:
        """By SIGUSR2, which is nobody else's."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return False
        caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
        return bool(int(caught, 16) >> (signal.SIGUSR2 - 1) & 1)

    def send(self, number: int) -> None:
        """It may have ended by now, and have been waited for by the fork server."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def end(self) -> Ended:
        while self.goes_on():
            pass
        self.process.join()
        printed, said = (file.read_text(errors="replace") for file in self.files)
        return Ended(self.process.exitcode, said, printed, self.work)


def _command(words: tuple[str, ...], directory: Path, files: list[Path], environment: dict[str, str]) -> None:
    import multiprocessing

    import torch

    os.environ |= environment | {"CRYSTAL_CACHE": str(directory / "cache")}
    os.chdir(directory)
    torch.set_num_threads(1)
    for fd, file in enumerate((os.devnull, *files)):
        os.dup2(os.open(file, os.O_RDWR), fd)
    sys.argv = ["crystal", *words]
    # a sweep's workers are forked too: to import torch would cost them more than all their trials
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    os.register_at_fork(after_in_child=_hear_nothing)

    from crystal.cli.__main__ import main

    main()


def _hear_nothing() -> None:
    """A worker has no handlers of its parent's when it is not forked."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)


def finished(words: tuple[str, ...], directory: Path) -> Ended:
    """A command from its beginning to its end, undisturbed."""
    return Running(words, directory).end()


def cpu_seconds() -> float:
    """Of this process and of all that it started and that have ended, which the fork server has waited for."""
    fields = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
