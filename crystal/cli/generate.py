"""`crystal logits` and `crystal generate`: what a checkpoint says. Imports when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from crystal.cli.options import Checkpoint, Json, console, print_result


def logits(
    checkpoint: Checkpoint,
    ids: Annotated[Path, typer.Option(metavar="FILE", help="token ids, .npy, integers [batch, seq]")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="where the logits go, .npy, fp32 [batch, seq, vocab]")],
    by_block: Annotated[
        bool | None,
        typer.Option(
            "--by-block/--whole",
            help="hold one block's weights at a time: slower, same numbers; default: where the model does not fit",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write fp32 logits for given token ids: the fidelity probe.

    Examples:
        crystal logits runs/demo --ids ids.npy --out logits.npy
        crystal logits smol --ids ids.npy --out logits.npy --json
    """
    from crystal.inference.logits import logits_file

    shape = logits_file(checkpoint, ids, out, by_block)
    print_result({"out": str(out), "shape": list(shape)}, as_json, f"{out}: fp32 {list(shape)}")


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="text to continue; as often as wanted, computed together")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='more of them, .jsonl: a string a line, or an object with a "prompt"'),
    ] = None,
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
    seed: Annotated[
        int, typer.Option(metavar="N", help="the same seed draws the same text; prompt i draws with N + i")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="prompts computed together")] = 8,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"],
        typer.Option(help="of weights and products; auto: fp32 where it fits into memory, else bf16"),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Continue texts from a checkpoint, greedily or sampled, with a KV cache.

    With --json one prompt gives an object, several give {"generations": [object, …]} in their order.

    Examples:
        crystal generate runs/demo --stage 1 --prompt "The President"
        crystal generate runs/demo --prompt "def " --prompt "class " --top-p 0.95
    """
    from crystal.inference.generate import generate_texts
    from crystal.inference.prompts import read_prompts

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts is not None else [])]
    if prompt is None and prompts is None:
        texts = [""]
    results = generate_texts(
        checkpoint, texts, stage, max_new_tokens, temperature, top_k, top_p, seed, console(), batch_size, dtype
    )
    whole = [text + result["text"] for text, result in zip(texts, results, strict=True)]
    single = prompts is None and len(texts) == 1
    result = results[0] if single else {"generations": results}
    print_result(result, as_json, "\n\n".join(whole), raw=not sys.stdout.isatty())
