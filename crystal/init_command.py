"""`crystal init`: a project of one's own. Imports when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crystal.options import Json, print_result


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="where the three files go; made if it is not there")],
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="a file or directory of text, several times; default: the sample corpus"),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="the run's name; default: the directory's")] = None,
    as_json: Json = False,
) -> None:
    """Look at files of text and write a recipe, a curriculum and a run file that train as they stand.

    Sources, formats, keys and languages are found by looking at the files. Nothing that is there is overwritten.

    Examples:
        crystal init mine --data texts --data programs
        crystal init first
    """
    from crystal import project

    result = project.init(directory, data or [], name)
    print_result(result, as_json, project.init_text(result))
