"""How a mistake is told: one line on stderr, and with `--json` an object on stdout as well."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

from crystal.cli.options import print_out
from crystal.errors import ConfigError, CrystalError, RunError
from crystal.files import reason
from crystal.output import interrupts, launcher
from crystal.output.printable import printable_line
from crystal.output.ranks import in_group, is_first, is_said_by_the_first, rank

_PLAIN = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid integer": "an integer",
    "a valid number": "a number",
}


def complain(message: str, error: CrystalError | None = None) -> None:
    """Say what was wrong. Of several processes the first speaks; once they train, any whose mistake is its own.

    error: what was raised; None: a mistake in the command line or the environment. Whether the command line asks for
    JSON is read off its words, for the mistake may be one in the words themselves.
    """
    error = error or ConfigError()
    shown = printable_line(message)
    interrupts.end_undisturbed()
    launcher.leave_last_words(f"crystal: {shown}", 2 if error.lasting else None)
    alike = is_said_by_the_first(shown)
    if is_first():
        if _wants_json(sys.argv[1:]):
            about = {"kind": error.kind, "message": message, "file": error.file, "key": error.key}
            print_out(json.dumps({"error": about}))
        print(f"crystal: {shown}", file=sys.stderr)
    elif in_group() and not alike:
        print(f"crystal: process {rank()}: {shown}", file=sys.stderr)


def of_the_machine(error: OSError | MemoryError | RuntimeError) -> RunError | None:
    """What the machine refused, where nobody nearer to it has said so: a full disk, no more files, threads or memory.

    None: the fault is the program's.
    """
    if isinstance(error, MemoryError):
        return RunError("out of memory")
    if isinstance(error, RuntimeError):  # Python's, where the system gives no thread, and torch's
        said = {"start new thread": "no more threads or processes (ulimit -u)", "allocate memory": "out of memory"}
        return next((RunError(ours) for theirs, ours in said.items() if theirs in str(error)), None)
    if error.errno is None:
        return None
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return RunError(f"{place}{reason(error)}", file=place.removesuffix(": ") or None)


def usage_message(error: Any) -> str:
    """What a usage error of typer's says, in one line and without the words of the library that checks values."""
    message = " ".join(error.format_message().split()).rstrip(".")
    command = error.ctx.command_path if error.ctx else "crystal"
    if hasattr(error.__cause__, "errors"):  # pydantic's, of a value of the wrong type
        problem = error.__cause__.errors()[0]
        subject = message.partition(": ")[0]
        expected = re.sub(r"^Input should be |, unable to parse .*$", "", problem["msg"])
        for theirs, ours in _PLAIN.items():
            expected = expected.replace(theirs, ours)
        if choices := re.search(r"is not one of (.*?)\.?$", expected):
            expected = f"one of {choices[1]}".replace("'", "")
        message = f"{subject}: expected {expected}, got {problem['input']!r}"
    return f"{message} (see {command} --help)"


def _wants_json(words: list[str]) -> bool:
    options = words[: words.index("--")] if "--" in words else words
    return "--json" in options
