"""`crystal config`: what a run file says once it is read, key by key."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crystal.cli import completion
from crystal.cli.options import Json, print_out, print_result
from crystal.errors import ConfigError

if TYPE_CHECKING:
    from crystal.workspace.config_keys import Key


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
        from crystal.workspace import config_keys as keys

        document = keys.schema()
        print_out(json.dumps(document) if as_json else json.dumps(document, indent=2))
        return
    if run is None:
        raise ConfigError("expected a RUN: a run file, the name of a packaged one, or a run directory")
    wanted = [word for word in words or () if "=" not in word]
    if len(wanted) > 1:
        raise ConfigError(f"expected one KEY and changes dotted.key=value, got {' and '.join(wanted)}")
    from crystal.run import load_run
    from crystal.workspace import config_keys as keys

    recorded = Path(run) / "config.yaml"
    loaded = load_run(recorded if os.path.lexists(recorded) else run, [word for word in words or () if "=" in word])
    found = keys.run_keys(loaded, *wanted)
    print_result(keys.as_dict(loaded, found), as_json, keys_text(found))


def keys_text(keys: list[Key]) -> str:
    """Two lines a key: value and origin; type, default and meaning. On a terminal the second is wrapped."""
    from crystal.config import CONFIGS

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    lines = []
    for k in keys:
        default = "no default" if k.required else f"default {_yaml(k.default)}"
        origin = k.origin
        if Path(origin).is_relative_to(CONFIGS):
            origin = str(Path("configs") / Path(origin).relative_to(CONFIGS))
        about = f"[{k.type}, {default}] {k.description}".rstrip()
        lines.append(f"{k.key}: {_yaml(k.value)}  # {origin}")
        wrapped = textwrap.wrap(about, width - 4, break_on_hyphens=False) if width > 20 else [about]
        lines += [f"    {line}" for line in wrapped]
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    """A value on one line, as an override takes it."""
    import yaml

    return yaml.safe_dump([value], default_flow_style=True, width=sys.maxsize, allow_unicode=True).strip()[1:-1]
