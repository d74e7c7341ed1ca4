"""Arguments and options that several commands share, and the one way they print."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from crystal.printable import printable

Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Run = Annotated[str, typer.Argument(metavar="RUN.yaml", help="a run file, or the name of a packaged one")]
Step = Annotated[int, typer.Option(help="a step of the run, from 1, as in metrics.jsonl")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[dotted.key=value]...", help="changes to the run")]


def is_first() -> bool:
    """Whether this is the process that speaks: alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def print_result(result: dict, as_json: bool, text: str, raw: bool = False) -> None:
    """The result as JSON, or the text that says the same; control characters in it are escaped, unless it is raw."""
    if not is_first():
        return
    try:
        print(json.dumps(result) if as_json else text if raw else printable(text), flush=True)
    except BrokenPipeError:  # `crystal … | head` has read enough; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console():
    """A rich console on stderr, for progress and notes; one process has a voice."""
    from rich.console import Console

    return Console(stderr=True, quiet=not is_first())
