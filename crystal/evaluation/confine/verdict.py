"""The name of a program's end, from its exit status and the last of what it wrote to stderr."""

from __future__ import annotations

import os
import re
import signal

from crystal.evaluation.confine.outcome import Status

_HEADER = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(: .*|$)")
_CAUSES: dict[Status, tuple[str, ...]] = {
    "memory": ("MemoryError", "Cannot allocate memory"),
    "disk": ("[Errno 28]", "[Errno 27]", "[Errno 122]"),  # no space, file too large, quota
    "processes": ("BlockingIOError: [Errno 11]", "can't start new thread"),
}


def verdict(how: int, through: bool, stderr: str) -> tuple[Status, str]:
    """how: as waitpid() gives it; through: it wrote its token, so it reached its end."""
    code = os.waitstatus_to_exitcode(how)
    if code == 0 and through:
        return "passed", ""
    if code == -signal.SIGXCPU:
        return "timeout", "used its processor time"
    if code < 0:
        names = {int(s): s.name for s in signal.Signals}
        return "killed", names.get(-code, f"signal {-code}")
    raised = _exception(stderr) or _torn(stderr)
    if code == 0 or not raised:
        return "failed", f"ended before its end (exit status {code})" if not through else f"exit status {code}"
    for status, texts in _CAUSES.items():
        if any(raised.startswith(text) or text in raised for text in texts):
            return status, one_line(raised)
    # files that are refused are named in the message; the filter's own EACCES is a socket's
    return "failed", one_line(raised) + (" (network)" if raised.endswith("[Errno 13] Permission denied") else "")


def one_line(text: str) -> str:
    """A program's words, harmless to a terminal."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 200 else f"{text[:199]}…"


def _exception(stderr: str) -> str:
    """The first line of what ended the last traceback, `ValueError: …`; empty: there is no traceback.

    Processes that the program started write between one another's lines, and what was kept of it may end in the middle
    of one: where the last traceback has no such line, it is the one before it that is asked.
    """
    before, header, rest = stderr.rpartition(_HEADER)
    if not header:  # a SyntaxError has no header
        start = stderr.rfind('  File "<stdin>", line ')
        return _raised(stderr[start:]) if start >= 0 else ""
    while header and not (found := _raised(rest)):
        before, header, rest = before.rpartition(_HEADER)
    return found if header else ""


def _torn(stderr: str) -> str:
    """What a program with more processes than it may have said, where several of them wrote through one another."""
    return next((text for text in _CAUSES["processes"] if text in stderr and _HEADER[:9] in stderr), "")


def _raised(traceback: str) -> str:
    lines = (line for line in traceback.splitlines() if line and not line[0].isspace())
    return next((line for line in lines if _EXCEPTION.match(line)), "")
