"""How a mistake is told: one line on stderr, and with `--json` an object on stdout as well."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from crystal.cli.options import print_out
from crystal.errors import ConfigError, CrystalError
from crystal.output.printable import printable_line
from crystal.output.ranks import is_first, rank

_PLAIN = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid integer": "an integer",
    "a valid number": "a number",
}


def complain(message: str, error: CrystalError | None = None) -> None:
    """Say what was wrong. Of several processes the first speaks; once they train, any, for it may be its own mistake.

    error: what was raised; None: a mistake in the command line or the environment. Whether the command line asks for
    JSON is read off its words, for the mistake may be one in the words themselves.
    """
    error = error or ConfigError()
    distributed, shown = sys.modules.get("torch.distributed"), printable_line(message)
    if is_first():
        if _wants_json(sys.argv[1:]):
            about = {"kind": error.kind, "message": message, "file": error.file, "key": error.key}
            print_out(json.dumps({"error": about}))
        print(f"crystal: {shown}", file=sys.stderr)
    elif distributed is not None and distributed.is_initialized():
        print(f"crystal: process {rank()}: {shown}", file=sys.stderr)


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
