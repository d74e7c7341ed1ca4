"""`crystal bench …`: ours beside the peers that are installed. One function a benchmark; imports when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from crystal.cli import completion
from crystal.cli.help import Commands
from crystal.cli.options import Json, console, print_result
from crystal.errors import ConfigError
from crystal.files import write_whole

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
    from crystal.bench.kernels import Asked, bench_kernels

    result = bench_kernels(Asked(offline, verify, bars, arch, ops, shapes, out), console())
    text = kernels_text(result)
    if out is not None:
        write_whole(out / "kernels.json", json.dumps(result, indent=1) + "\n")
        write_whole(out / "kernels.txt", text + "\n")
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
    from crystal.bench.streaming import bench_stream

    config = WeightStreamingConfig(
        name="weight_streaming", moments=moments, dtype=dtype, buffers_gb=buffers_gb, path=path
    )
    result = bench_stream(model, tokens, micro_batches, steps, config, console())
    print_result(result, as_json, stream_text(result))


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
    from crystal.bench.training import SHAPES, bench_train

    if d_model not in SHAPES:
        raise ConfigError(f"--d-model {d_model}: expected one of {', '.join(map(str, SHAPES))}")
    if wrong := [item for item in python or [] if "=" not in item]:
        raise ConfigError(f"--python {wrong[0]}: expected PEER=PYTHON")
    shape = {"d_model": d_model} | SHAPES[d_model]
    pythons = dict(item.split("=", 1) for item in python or [])
    names = [name for name in peers.split(",") if name]
    result = bench_train(shape, names, pythons, dtype, threads, compiled, rounds, steps, console())
    print_result(result, as_json, train_text(result))


def kernels_text(result: dict) -> str:
    """What was run and how, a line; then the table of that run."""
    from crystal.bench.kernels import listed, title
    from crystal.kernels.bench import tables

    if result["measured"] and "copy_gb_s" in result:
        head = f"{result['verdict']}  {title(result)}; median of plain calls, L2 flushed"
        return f"{head}\n\n{tables.measured_table(result['rows'])}"
    versions = listed(result["versions"])
    if "bars" in result:
        head = (
            f"{result['verdict']}  the ten bars for {result['device']}, {versions}; counts and CPU runs, never a time"
        )
        return f"{head}\n\n{tables.bars_table(result['bars'])}"
    if "times_torchs_error" in result:
        where = result["device"] if isinstance(result["device"], str) else result["device"]["name"]
        head = (
            f"{result['verdict']}  relative errors (L2) against fp64 on the {where}: at most "
            f"{result['times_torchs_error']:g} x torch's own in the same dtype, {versions}"
        )
        return f"{head}\n\n{tables.errors_table(result['rows'])}"
    return (
        f"compiled for {result['device']}, {versions}; counts, never a time\n\n{tables.offline_table(result['rows'])}"
    )


def stream_text(result: dict) -> str:
    """A step beside its two floors."""
    head = (
        f"{result['model']}, {result['parameters']:,} parameters, {result['tokens']} tokens a step, "
        f"{result['dtype']} compute, {result['moments']} moments, {result['store_bytes'] / 1e9:.1f} GB store\n"
    )
    parts = f"compute {result['compute_s']:.2f} s and I/O {result['io_s']:.2f} s"
    tail = f"{result['tokens_per_second']:.1f} tokens/s, peak {result['peak_rss_bytes'] / 1e9:.2f} GB"
    if result["overlap_efficiency"] is None:
        return (
            f"{head}step {result['step_s']:.2f} s, {parts}: overlap not measured, for in {result['impossible_rounds']} "
            f"rounds of {len(result['rounds']['step_s'])} a step took less than its parts; {tail}"
        )
    return (
        f"{head}step {result['step_s']:.2f} s = {result['step_over_floor']:.2f} x the larger of {parts} (overlap "
        f"efficiency {result['overlap_efficiency']:.0%}), {tail}"
    )


def train_text(result: dict) -> str:
    """A line a trainer, and ours beside the best of the others."""
    shape = result["shape"]
    lines = [
        f"d_model {shape['d_model']}, {shape['n_layers']} layers, {shape['batch']} x {shape['seq_len']} tokens, "
        f"{result['threads']} threads",
        f"{'':14}{'tokens/s':>10}{'tokens/CPU s':>14}{'(turns)':>16}{'peak MiB':>10}{'loss':>8}",
    ]
    for name, p in result["providers"].items():
        turns = f"{p['spread'][0]:,.0f}-{p['spread'][1]:,.0f}"
        lines.append(
            f"{name:14}{p['tokens_per_second']:>10,.0f}{p['tokens_per_cpu_second']:>14,.0f}{turns:>16}"
            f"{p['peak_rss_bytes'] / 2**20:>10,.0f}{p['loss']:>8.3f}"
        )
    lines += [f"{name:14}not measured: {reason}" for name, reason in result["not_measured"].items()]
    if result["ratio_to_best_peer"] is not None:
        lines.append(
            f"to the best peer: {result['ratio_to_best_peer']:.2f} by the clock, "
            f"{result['ratio_to_best_peer_cpu']:.2f} by CPU time"
        )
    lines.append(f"of the best matrix product measured here: {result['matmul_peak_fraction']:.0%}")
    return "\n".join(lines)
