"""`crystal logits` and `crystal generate`: what a checkpoint says. Imports when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from crystal.cli.options import Checkpoint, Json, console, print_result


def logits(
    checkpoint: Checkpoint,
    ids: Annotated[Path, typer.Option(metavar="FILE", help="token ids, .npy, integers [batch, seq]")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="where the logits go, .npy, fp32 [batch, seq, vocab]")],
    as_json: Json = False,
) -> None:
    """Write fp32 logits for given token ids: the fidelity probe.

    Examples:
        crystal logits runs/demo --ids ids.npy --out logits.npy
        crystal logits smol --ids ids.npy --out logits.npy --json
    """
    from crystal.inference.logits import logits_file

    shape = logits_file(checkpoint, ids, out)
    print_result({"out": str(out), "shape": list(shape)}, as_json, f"{out}: fp32 {list(shape)}")


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="text to continue")] = "",
    stage: Annotated[
        int | None, typer.Option(metavar="N", help="of a run directory: the end of this stage, from 1")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="tokens to write at most")] = 64,
    temperature: Annotated[float, typer.Option(min=0, metavar="X", help="0: always the likeliest token")] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="draw from the N likeliest tokens; default: all")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="X", help="draw from the likeliest tokens that hold X of the probability"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="the same seed draws the same text")] = 0,
    as_json: Json = False,
) -> None:
    """Continue a text from a checkpoint, greedily or sampled, with a KV cache.

    Examples:
        crystal generate runs/demo --stage 1 --prompt "The President"
        crystal generate runs/demo --prompt "def " --temperature 0.8 --top-p 0.95
    """
    from crystal.inference.generate import generate_text

    result = generate_text(checkpoint, prompt, stage, max_new_tokens, temperature, top_k, top_p, seed, console())
    print_result(result, as_json, prompt + result["text"], raw=not sys.stdout.isatty())
