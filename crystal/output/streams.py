"""The process's own streams: there whatever the command was started with, and no reason to stop.

A closed one (`2>&-`, some daemons) is opened on /dev/null: else the next file that is opened takes its number, and
what C code or a child says on it lies in the middle of somebody's data. What is said on stderr to a full disk, or to a
reader that has gone, is lost and nothing more: hours of training do not end for a line of progress.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys

from crystal.output.printable import SIGNS


def open_all() -> None:
    """Have stdin, stdout and stderr, which show characters that their encoding lacks in another form (`SIGNS`)."""
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if type(sys.stderr) is io.TextIOWrapper and sys.stderr is sys.__stderr__:
        sys.stderr = _Patient(sys.stderr.buffer, sys.stderr.encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=SIGNS)


class _Patient(io.TextIOWrapper):
    """A stream on which a write that fails is lost."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()
