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
        Path,
        typer.Argument(
            metavar="DIR|FILE",
            help="a Hugging Face directory, a .mdl, or Model Zoo YAML: a file, a directory of them or of phaseN/",
        ),
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
    text = f"{result['parameters']:,} parameters from {source} to {to}"
    print_result(result, as_json, "\n".join([text, *result.get("notes", [])]))


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT|RUN",
            help="a checkpoint or run directory; for cerebras-yaml a run file",
            autocompletion=completion.runs,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR|FILE", help="directory to write; for gguf and mdl a file")],
    to: Annotated[
        Literal["hf", "native", "gguf", "safetensors", "mdl", "cerebras-yaml"],
        typer.Option(
            help="hf: published names; native: plain StableLM or LLaMA, for any transformers; gguf: for llama.cpp; "
            "safetensors: ours; mdl: Cerebras' checkpoint; cerebras-yaml: Model Zoo files"
        ),
    ] = "hf",
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16", "q8_0"], typer.Option(help="of the weights; q8_0: gguf only")
    ] = "fp32",
    stage: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="of a run directory: the end of this stage, from 1")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="ask transformers and llama.cpp, and compare their answers with ours")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint for other people's software, or a run as Model Zoo files.

    Examples:
        crystal export runs/demo --to gguf --dtype q8_0 --out demo.gguf --check
        crystal export demo --to cerebras-yaml --out model-zoo
    """
    if to in ("mdl", "cerebras-yaml"):
        for given, flag in ((dtype != "fp32", "--dtype"), (check, "--check")):
            if given:
                raise ConfigError(f"{flag}: expected with hf, native, gguf or safetensors, not with {to}")
    if to == "cerebras-yaml":
        if stage is not None:
            raise ConfigError("--stage: expected with a run directory, not with cerebras-yaml")
        from crystal.interop.cerebras_params_write import export_parameters

        result = export_parameters(str(source), out)
        text = "\n".join([f"{file}: written from {source}" for file in result["files"]] + result["left_out"])
        print_result(result, as_json, text)
        return
    if stage is not None:
        from crystal.checkpoint import locate

        source = locate(source, stage)
    if to == "mdl":
        from crystal.interop.cerebras_mdl import export_mdl

        made = {"form": "mdl", "files": [out.name], "agreement": {}}
        print_result(export_mdl(source, out) | made, as_json, f"{out}: written from {source}")
        return
    if check:
        from crystal.interop.agreement import ready

        ready(source)
    result = _exported(source, out, to, dtype) | {"agreement": {}}
    text = "\n".join([f"{out}: written from {source}", *result.get("notes", [])])
    agreed = None
    if check:
        from crystal.interop.agreement import check as ask

        agreed = ask(source, out, to, dtype)
        result |= agreed.json()
        text += f"\n{agreed.table()}"
    print_result(result, as_json, text)
    if agreed is not None and agreed.verdict != "PASS":
        raise typer.Exit(1)


def _exported(source: Path, out: Path, to: str, dtype: str) -> dict:
    """{out, to, form, files, …} of one export, JSON-ready."""
    if to == "native":
        from crystal.interop.native import export_native

        return {"to": to} | export_native(source, out, dtype)
    if to == "gguf":
        from crystal.interop.gguf_file import export_gguf

        return {"to": to} | export_gguf(source, out, dtype)
    from crystal.interop.huggingface import export_published
    from crystal.interop.native import DTYPES

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected {', '.join(DTYPES)} for {to}, got {dtype}")
    export_published(source, out, to, str(DTYPES[dtype]).removeprefix("torch."))
    return {"out": str(out), "to": to, "form": to, "files": sorted(file.name for file in out.iterdir())}
