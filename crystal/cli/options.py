"""Arguments and options that several commands share, and the one way they print."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from crystal.cli import completion
from crystal.errors import RunError
from crystal.files import reason
from crystal.output.printable import printable
from crystal.output.ranks import is_first

Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, errors too")]
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN.yaml", help="a run file, or the name of a packaged one", autocompletion=completion.run_files
    ),
]
Step = Annotated[int, typer.Option(metavar="STEP", help="a step of the run, from 1, as in metrics.jsonl")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="dotted.key=value", help="changes to the run, as many as wanted")
]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT|RUN", help="a checkpoint or run directory", autocompletion=completion.runs)
]
Parametrization = Annotated[
    Literal["sp", "mup", "crystalcoder", "completep"] | None,
    typer.Option(help="check this parametrization instead of the model's own"),
]
Checked = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RUN.yaml|MODULE:NAME",
        help="a preset, rung, family or run file, or a function of yours from a width to a module",
        autocompletion=completion.checked,
    ),
]
Accept = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="a tensor, or pattern of names, that may be INCONCLUSIVE; as often as wanted"),
]


def is_own(model: str) -> bool:
    """Is this a user's MODULE:NAME or FILE.py:NAME, rather than a model or a run file by name?"""
    yaml = model.endswith((".yaml", ".yml")) or (Path(model).exists() and not model.endswith(".py"))
    return not yaml and (":" in model or model.endswith(".py"))


def print_result(result: dict, as_json: bool, text: str, raw: bool = False) -> None:
    """The result as JSON, or the text that says the same; control characters in it are escaped, unless it is raw."""
    if is_first():
        print_out(json.dumps(result) if as_json else text if raw else printable(text))


def print_out(text: str) -> None:
    """Print on stdout, whose reader may have gone. Raises RunError where it is a file that cannot be written."""
    try:
        print(text, flush=True)
    except OSError as error:  # what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `crystal … | head` has read enough
            raise RunError(f"stdout: cannot be written: {reason(error)}") from None


def console():
    """A rich console on stderr, for progress and notes; one process has a voice."""
    from rich.console import Console

    return Console(stderr=True, quiet=not is_first())
