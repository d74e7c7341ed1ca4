"""`crystal import` and `crystal export`: other programs' checkpoints and parameter files, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crystal.cli import completion
from crystal.cli.options import Json, print_result
from crystal.errors import ConfigError


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="DIR|FILE", help="a Hugging Face directory, a .mdl, or Model Zoo YAML file(s)")
    ],
    to: Annotated[
        Path,
        typer.Option(metavar="CKPT|RUN.yaml", help="checkpoint directory to write; for Model Zoo files a run file"),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="the preset or rung of a .mdl that does not say it",
            autocompletion=completion.models,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a published directory or a Cerebras checkpoint into a checkpoint, or Model Zoo files into a run file.

    Examples:
        crystal import SmolLM2-135M --to smol
        crystal import params.yaml --to mine.yaml
    """
    if model is not None and source.suffix != ".mdl":
        raise ConfigError(f"--model: expected a .mdl to go with it, got {source}")
    if to.suffix in (".yaml", ".yml"):
        from crystal.interop.cerebras_params_read import import_parameters

        result = import_parameters(source, to)
        print_result(result, as_json, f"{len(result['stages'])} stages from {source} to {to}; its data: is to fill in")
        return
    if source.suffix == ".mdl":
        from crystal.interop.cerebras_mdl import import_mdl

        result = import_mdl(source, to, model)
    else:
        from crystal.interop.huggingface import import_published

        result = import_published(source, to)
    print_result(result, as_json, f"{result['parameters']:,} parameters from {source} to {to}")


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT|RUN",
            help="a checkpoint or run directory; for cerebras-yaml a run file",
            autocompletion=completion.runs,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR|FILE", help="directory to write; for mdl a file")],
    to: Annotated[
        Literal["hf", "safetensors", "mdl", "cerebras-yaml"],
        typer.Option(
            help="hf: published names; safetensors: ours; mdl: Cerebras' checkpoint; cerebras-yaml: Model Zoo files"
        ),
    ] = "hf",
    as_json: Json = False,
) -> None:
    """Write a checkpoint in the published form, as it is or as Cerebras' .mdl; or a run as Model Zoo files.

    Examples:
        crystal export runs/demo --out demo-hf
        crystal export demo --to cerebras-yaml --out model-zoo
    """
    if to == "cerebras-yaml":
        from crystal.interop.cerebras_params_write import export_parameters

        result = export_parameters(str(source), out)
        text = "\n".join([f"{file}: written from {source}" for file in result["files"]] + result["left_out"])
        print_result(result, as_json, text)
        return
    if to == "mdl":
        from crystal.interop.cerebras_mdl import export_mdl

        print_result(export_mdl(source, out), as_json, f"{out}: written from {source}")
        return
    from crystal.interop.huggingface import export_published

    print_result({"out": str(export_published(source, out, to)), "to": to}, as_json, f"{out}: written from {source}")
