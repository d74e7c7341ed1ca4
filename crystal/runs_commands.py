"""`crystal runs` and `crystal compare`: the runs there are, and several beside one another. Imports when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crystal import completion
from crystal.options import Json, print_result


def runs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="where to look for run directories")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs: state, step, losses, speed, time left, disk, last sign of life and backend.

    A run is training, finished, stopped (at --until or the end of a --stage), interrupted (a signal, state saved),
    failed (it ended without a word) or not started. VAL is the mean over the sources.

    Examples:
        crystal runs
        crystal runs /data/runs --json
    """
    from crystal.runs import as_dict, find_runs, runs_text

    # the directory of a first run does not exist before it
    found = [] if directory == Path("runs") and not directory.exists() else find_runs(directory)
    print_result(as_dict(found), as_json, runs_text(found, directory))


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="two run directories or run files, or more", autocompletion=completion.runs),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw the curves over one another: .png, .svg or .pdf")
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="validation loss of this source only; default: of each")
    ] = None,
    as_json: Json = False,
) -> None:
    """Losses of several runs side by side, by tokens seen, and the config keys that differ.

    Examples:
        crystal compare runs/demo runs/demo-fp32
        crystal compare runs/a runs/b runs/c --out curves.svg --source python
    """
    from crystal.compare import compare as compare_runs

    result, text = compare_runs(runs, out, source)
    print_result(result, as_json, text)
