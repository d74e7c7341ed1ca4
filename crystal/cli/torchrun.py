"""`python -m crystal.cli.torchrun` takes torchrun's words and does what it does, but ends as its workers ended.

torchrun itself ends with 1 and a traceback after whatever was not 0: a run that was stopped and saved (130), a user's
mistake (2). Here the run's own line stands last, and its code is this command's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from crystal.output import interrupts, launcher


class _Stopped(BaseException):
    """A stop signal came that torch does not hear: before it has started workers, or one that it has no ear for."""

    def __init__(self, number: int):
        self.sigval = signal.Signals(number)


def main(words: list[str]) -> int:
    """Run torchrun; words: its command line. Returns the exit code: its workers' where all of them ended for good with
    the same, else 1."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with _answered(_stop), tempfile.TemporaryDirectory(prefix="crystal-torchrun-") as logs:
        arguments = run.parse_args(["--log-dir", os.environ.get("PET_LOG_DIR", logs), *words])
        try:
            run.run(arguments)
            return 0
        except (SignalException, _Stopped) as stop:
            stopped = interrupts.CODE, interrupts.said_of(stop.sigval)
            why = f"crystal: {stop.sigval.name}: not all processes of this machine had saved when they were ended"
        except ChildFailedError as failure:
            stopped, why = None, str(failure)
        with _answered(signal.SIG_IGN):  # the workers have been told
            if stopped:
                _wait_for_workers(getattr(arguments, "shutdown_timeout", None) or launcher.TORCHRUN_GRACE)
            code, line = launcher.how_workers_ended(arguments.log_dir, stopped) or (1, why)
            print(line, file=sys.stderr)
            return code


@contextlib.contextmanager
def _answered(answer: Callable | signal.Handlers) -> Iterator[None]:
    """Stop signals are answered so, but for those that were ignored at the start, until torch has its own handlers."""
    before = {number: signal.signal(number, answer) for number in interrupts.stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was C code's


def _wait_for_workers(seconds: float) -> None:
    """torch has waited for them already, unless another signal cut that short: they may be at their save. One that was
    about to be started may not have heard of the stop."""
    began, tell_at = time.monotonic(), [0.0, 1.0]  # a signal between fork and exec is lost; a repeated one does no harm
    with contextlib.suppress(ChildProcessError):  # there are none left
        while (passed := time.monotonic() - began) < seconds:
            if tell_at and passed >= tell_at[0]:
                tell_at.pop(0)
                _tell_children()
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.05)


def _tell_children() -> None:
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread or a child that has ended meanwhile
            for pid in children.read_text().split():
                os.kill(int(pid), signal.SIGTERM)


def _stop(number: int, _frame: object) -> None:
    raise _Stopped(number)


def _leave(number: int, _frame: object) -> None:
    """While torch is imported, which may lose an exception (`crystal.output.interrupts`): nothing is to be undone."""
    os.write(2, f"{interrupts.said_of(number)}\n".encode())
    os._exit(interrupts.CODE)


if __name__ == "__main__":
    with _answered(_leave):
        try:
            code = main(sys.argv[1:])
        except _Stopped as stop:  # before torchrun began, or as it ended
            print(interrupts.said_of(stop.sigval), file=sys.stderr)
            code = interrupts.CODE
    sys.exit(code)
