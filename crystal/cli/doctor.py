"""`crystal doctor`: what this machine is, and what was chosen from that."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crystal.cli.options import Json, print_result


def doctor(
    measure: Annotated[bool, typer.Option("--measure", help="measure anew; best on an idle machine")] = False,
    directory: Annotated[Path, typer.Option("--dir", metavar="DIR", help="whose disk is timed")] = Path(),
    as_json: Json = False,
) -> None:
    """Say what this machine is, how fast it is, what was chosen from that, and what is slow and why.

    Examples:
        crystal doctor
        crystal doctor --measure --json
    """
    from crystal.workspace.doctor import examine

    result = examine(measure, directory)
    print_result(result, as_json, doctor_text(result))


def _library(dtype: str, name: str) -> str:
    """Whose products a choice is."""
    if name == "torch":
        import torch

        library, there = ("MKL", torch.backends.mkl) if dtype == "fp32" else ("oneDNN", torch.backends.mkldnn)
        return library if there.is_available() else "torch's BLAS"
    others = {
        ("fp32", "onednn"): "oneDNN",
        ("bf16", "onednn"): "oneDNN, by another call",
        ("bf16", "widened"): "fp32 products, rounded",
        ("bf16", "widened_onednn"): "oneDNN's fp32 products, rounded",
    }
    return others.get((dtype, name), name)


def doctor_text(result: dict) -> str:
    from crystal.kernels import tuning
    from crystal.kernels.gcc import march
    from crystal.workspace.doctor import rates

    memory, disk = result["memory"], result["disk"]
    lines = [
        f"processor     {result['processor']}, {result['cores']} cores, {result['threads']} threads",
        f"instructions  {' '.join(result['instructions']) or 'not known'}",
        f"memory        {_gb(memory['total_bytes'])}, {_gb(memory['available_bytes'])} free; load {result['load']}",
        f"software      torch {result['torch']}, Python {result['python']}, {result['gcc'] or 'no gcc'}"
        + (f" for {march()}" if result["gcc"] else ""),
        f"CPU kernels   {result['kernels']}",
    ]
    for dtype in tuning.DTYPES:
        known = sorted(rates(result["choices"], dtype).items(), key=lambda item: -item[1])
        named = [f"{_library(dtype, n)} {r / 1e9:,.0f}" for n, r in known if n != "transposed"]
        lines.append(f"{dtype} products {', '.join(named) or 'not measured'} GFLOP/s (median over sizes)")
    lines.append(f"dtype auto    {result['dtype']}")
    lines += _choice_lines(result)
    if result["waiting"]:
        w = result["waiting"]
        lines.append(
            f"threads wait  {w['spin_count']:g} looks of {w['look_ns']:g} ns, then sleep: a wake takes "
            f"{w['wake_ns'] / 1e3:.1f} us; in force: {w['in_force'] or 'the OpenMP default'}"
        )
    if "error" not in disk:
        lines.append(
            f"disk          write {disk['write_bytes_per_second'] / 1e6:,.0f} MB/s, read "
            f"{disk['read_bytes_per_second'] / 1e6:,.0f} MB/s, {_gb(disk['free_bytes'])} free under {disk['directory']}"
        )
    confined = result["confinement"]
    layers = ", ".join(f"{name} {what}" for name, what in confined["layers"].items())
    said = "confined by" if confined["sufficient"] else f"not confined, {'; '.join(confined['missing'])}; there are"
    lines.append(f"programs      {said} {layers or 'no layers'}")
    lines += [f"GPU           {g['name']}, {_gb(g['memory_bytes'])}, {g['capability']}" for g in result["gpus"]]
    return "\n".join([*lines, *(f"slow: {line}" for line in result["slow"])])


def _choice_lines(result: dict) -> list[str]:
    """A line for each kind of choice: what was chosen at each size."""
    kinds: dict[str, list[str]] = {}
    for key, case in result["choices"].items():
        words = key.split()
        kind, size = (key, "") if len(words) < 3 else (" ".join(words[:2]), " ".join(words[2:]))
        kinds.setdefault(kind, []).append(f"{size} {case['chosen']}".strip())
    seconds, where = result["tuning"]["seconds"], result["tuning"]["from"]
    lines = [f"choices       {where}" + (f" in {seconds:.1f} s" if where == "measured here" else "")]
    return lines + [f"  {kind.replace('_', ' ')}: {', '.join(chosen)}" for kind, chosen in kinds.items()]


def _gb(n: int | None) -> str:
    return "?" if n is None else f"{n / 1e9:,.1f} GB"
