"""`crystal bench …`: ours beside the peers that are installed. One function a benchmark; imports when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crystal import completion
from crystal.errors import ConfigError
from crystal.help import Commands
from crystal.options import Json, console, print_result

bench = Commands(
    help="""Benchmarks, side by side with peers that are installed.

Examples:
    crystal bench train --threads 2
    crystal bench kernels --bars
"""
)


@bench.command()
def kernels(
    offline: Annotated[bool, typer.Option("--offline", help="without a GPU: compile, and count instructions")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="measure only errors against fp64; with --offline on the CPU")
    ] = False,
    bars: Annotated[bool, typer.Option("--bars", help="draw ten bars beside the peers; needs no GPU")] = False,
    arch: Annotated[
        Literal["sm_80", "sm_90"], typer.Option(help="the GPU that --offline and --bars compile for")
    ] = "sm_80",
    ops: Annotated[str | None, typer.Option(metavar="NAME,...", help="which operators; default: all")] = None,
    shapes: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="which shapes; default: crystalcoder-7b,amber-7b,…")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write JSON and table there, and a picture of what was measured")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fused kernels beside torch, torch.compile, Liger and flash-attn: measured on a GPU, or compiled --offline.

    Examples:
        crystal bench kernels --bars
        crystal bench kernels --offline --arch sm_90 --ops rms_norm
    """
    from crystal.bench_kernels import Asked, bench_kernels

    result, text = bench_kernels(Asked(offline, verify, bars, arch, ops, shapes, out), console())
    print_result(result, as_json, text)
    if result.get("verdict") == "FAIL":
        raise typer.Exit(1)


@bench.command()
def stream(
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="a preset or rung", autocompletion=completion.models)
    ] = "crystalcoder-w2048-l24",
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="tokens of a micro-batch")] = 2048,
    micro_batches: Annotated[int, typer.Option(min=1, metavar="N", help="micro-batches of a step")] = 1,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="steps to measure; the median counts")] = 3,
    moments: Annotated[
        Literal["fp32", "bf16", "int8"], typer.Option(help="how the store keeps AdamW's moments")
    ] = "fp32",
    dtype: Annotated[
        Literal["auto", "bf16", "fp32"], typer.Option(help="what it computes in; auto: the faster here")
    ] = "auto",
    buffers_gb: Annotated[
        float | None, typer.Option(metavar="X", help="memory to read ahead in; default: a block's state")
    ] = None,
    path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where the scratch store goes; default: a temporary directory")
    ] = None,
    as_json: Json = False,
) -> None:
    """A weight-streaming step beside pure compute and pure I/O, measured in one run.

    Examples:
        crystal bench stream --model crystalcoder-w256-l4 --tokens 512
        crystal bench stream --moments int8 --path /mnt/nvme
    """
    from crystal.backends.config import WeightStreamingConfig
    from crystal.bench_stream import bench_stream

    config = WeightStreamingConfig(
        name="weight_streaming", moments=moments, dtype=dtype, buffers_gb=buffers_gb, path=path
    )
    result, text = bench_stream(model, tokens, micro_batches, steps, config, console())
    print_result(result, as_json, text)


@bench.command()
def train(
    d_model: Annotated[
        int, typer.Option(metavar="N", help="256 (the reference shape), 512 or 1024; 64 is for trying it out")
    ] = 256,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="what it computes in")] = "bf16",
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile for all trainers")] = False,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="threads of each trainer")] = 1,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="turns of each trainer")] = 4,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="steps of a turn")] = 2,
    peers: Annotated[
        str, typer.Option(metavar="NAME,...", help="whom to measure beside us")
    ] = "litgpt,transformers,trainer,nanogpt",
    python: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="a peer's own Python: litgpt=/venv/bin/python")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tokens/s of the cpu backend beside litgpt, transformers (plain loop, Trainer) and a nanoGPT-style loop.

    Examples:
        crystal bench train --d-model 512 --threads 2
        crystal bench train --peers transformers,nanogpt --dtype fp32
    """
    from crystal.bench_train import SHAPES, bench_train

    if d_model not in SHAPES:
        raise ConfigError(f"--d-model {d_model}: expected one of {', '.join(map(str, SHAPES))}")
    if wrong := [item for item in python or [] if "=" not in item]:
        raise ConfigError(f"--python {wrong[0]}: expected PEER=PYTHON")
    shape = {"d_model": d_model} | SHAPES[d_model]
    pythons = dict(item.split("=", 1) for item in python or [])
    names = [name for name in peers.split(",") if name]
    result, text = bench_train(shape, names, pythons, dtype, threads, compiled, rounds, steps, console())
    print_result(result, as_json, text)
