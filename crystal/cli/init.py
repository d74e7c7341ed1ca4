"""`crystal init`: a project of one's own. Imports when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crystal.cli.options import Json, print_result


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
    from crystal.workspace import project

    result = project.init(directory, data or [], name)
    print_result(result, as_json, init_text(result))


def init_text(result: dict) -> str:
    """What was found and written, and what to do next."""
    lines = []
    for source, found in result["sources"].items():
        lines.append(f"{source}: about {found['bytes'] / 1e6:,.2f} MB of text")
        for entry in found["entries"]:
            keys = ", ".join(f"{key} {value}" for key, value in entry["keys"].items())
            files = f"{entry['count']} file{'s' * (entry['count'] > 1)}"
            lines.append(f"  {files} {entry['files']}" + (f" ({keys})" if keys else ""))
    if result["passed_over"]:
        others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(result["passed_over"].items()))
        lines.append(f"passed over, not known as text: {others}")
    lines.append(f"written: {', '.join(result['files'])}")
    return "\n".join([*lines, "next:", *(f"  {command}" for command in result["commands"])])
