"""`crystal config`: what a run file says once it is read, key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from crystal import completion
from crystal.errors import ConfigError
from crystal.options import Json, print_out, print_result


def config(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="a run file, the name of a packaged one, or a run directory",
            autocompletion=completion.runs,
        ),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY|dotted.key=value", help="one key or section to show; changes to the run"),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON schema of run files instead, for editors")
    ] = False,
    as_json: Json = False,
) -> None:
    """Every key of a run: value, where it came from, type, default and meaning.

    Examples:
        crystal config demo train.seed
        crystal config runs/demo curriculum.stages --json
    """
    if schema:
        from crystal import keys

        document = keys.schema()
        print_out(json.dumps(document) if as_json else json.dumps(document, indent=2))
        return
    if run is None:
        raise ConfigError("expected a RUN: a run file, the name of a packaged one, or a run directory")
    wanted = [word for word in words or () if "=" not in word]
    if len(wanted) > 1:
        raise ConfigError(f"expected one KEY and changes dotted.key=value, got {' and '.join(wanted)}")
    from crystal import keys
    from crystal.run import load_run

    recorded = Path(run) / "config.yaml"
    loaded = load_run(recorded if recorded.is_file() else run, [word for word in words or () if "=" in word])
    found = keys.run_keys(loaded, *wanted)
    print_result(keys.as_dict(loaded, found), as_json, keys.keys_text(found))
