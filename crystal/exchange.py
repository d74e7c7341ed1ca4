"""`crystal import` and `crystal export`: other programs' checkpoints and parameter files, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crystal.config import ConfigError
from crystal.options import Json, print_result


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="DIR|X.mdl|FILE.yaml", help="Hugging Face directory, .mdl, Model Zoo file(s)")
    ],
    to: Annotated[Path, typer.Option(help="checkpoint directory to write, or RUN.yaml for Model Zoo files")],
    model: Annotated[str | None, typer.Option(help="a .mdl that does not say: its preset or rung")] = None,
    as_json: Json = False,
) -> None:
    """Read a published directory or a Cerebras checkpoint into a checkpoint, or Model Zoo files into a run file."""
    if model is not None and source.suffix != ".mdl":
        raise ConfigError(f"--model: expected a .mdl to go with it, got {source}")
    if to.suffix in (".yaml", ".yml"):
        from crystal.modelzoo_read import import_parameters

        result = import_parameters(source, to)
        print_result(result, as_json, f"{len(result['stages'])} stages from {source} to {to}; its data: is to fill in")
        return
    if source.suffix == ".mdl":
        from crystal.interchange_cerebras import import_mdl

        result = import_mdl(source, to, model)
    else:
        from crystal.interchange import import_published

        result = import_published(source, to)
    print_result(result, as_json, f"{result['parameters']:,} parameters from {source} to {to}")


def export(
    source: Annotated[Path, typer.Argument(metavar="CKPT|RUN", help="a checkpoint or run directory; a run file")],
    out: Annotated[Path, typer.Option(help="directory to write; for mdl a file")],
    to: Annotated[
        Literal["hf", "safetensors", "mdl", "cerebras-yaml"],
        typer.Option(help="published names, or ours; Cerebras' checkpoint; a run file as Model Zoo parameter files"),
    ] = "hf",
    as_json: Json = False,
) -> None:
    """Write a checkpoint in the published form, as it is or as Cerebras' .mdl; or a run as Model Zoo files."""
    if to == "cerebras-yaml":
        from crystal.modelzoo import export_parameters

        result = export_parameters(str(source), out)
        text = "\n".join([f"{file}: written from {source}" for file in result["files"]] + result["left_out"])
        print_result(result, as_json, text)
        return
    if to == "mdl":
        from crystal.interchange_cerebras import export_mdl

        print_result(export_mdl(source, out), as_json, f"{out}: written from {source}")
        return
    from crystal.interchange import export_published

    print_result({"out": str(export_published(source, out, to)), "to": to}, as_json, f"{out}: written from {source}")
