"""`crystal bench kernels`: which of its five runs is asked for, what it needs, and its result."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crystal.errors import ConfigError
from crystal.kernels.catalog import OPERATORS
from crystal.kernels.dispatch import DTYPES, HAS_TRITON
from crystal.output.progress import Bar, note

if TYPE_CHECKING:
    from rich.console import Console

WITHOUT_GPU = (
    "no CUDA GPU here, and nothing is timed without one; --offline compiles the kernels for "
    "one, --offline --verify runs them on the CPU against fp64, --bars prints the ten bars"
)
OFFLINE_SHAPES = ("crystalcoder-7b", "amber-7b")


@dataclass(frozen=True)
class Asked:
    """The command's flags. ops and shapes: comma-separated names, None for the default."""

    offline: bool = False
    verify: bool = False
    bars: bool = False
    arch: str = "sm_80"
    ops: str | None = None
    shapes: str | None = None
    out: Path | None = None


def bench_kernels(asked: Asked, console: Console) -> dict:
    """JSON-ready; `verdict` is there where something is judged. A picture of what was measured goes to `out`.

    Raises ConfigError.
    """
    ops = _names(asked.ops, "--ops", [o.name for o in OPERATORS])
    shapes = _names(asked.shapes, "--shapes", [s for o in OPERATORS for s in o.shapes])
    _refuse(asked)
    if asked.out is not None:
        try:
            asked.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out: {asked.out} cannot be written: {error.strerror}") from None
    try:
        if asked.bars:
            return _bars(int(asked.arch[3:]), console)
        if asked.verify:
            return _verify(asked.offline, ops, shapes, console)
        if asked.offline:
            return _compile(int(asked.arch[3:]), ops, shapes or OFFLINE_SHAPES, console)
        return _measure(ops, shapes, asked.out, console)
    except RuntimeError as error:
        if "no gcc" not in str(error):
            raise
        raise ConfigError(str(error)) from None


def _names(given: str | None, flag: str, known: list[str]) -> tuple[str, ...] | None:
    names = None if given is None else tuple(name.strip() for name in given.split(","))
    for name in names or ():
        if name not in known:
            raise ConfigError(f"{flag}: {name!r} is none of {', '.join(dict.fromkeys(known))}")
    return names


def _refuse(asked: Asked) -> None:
    """What cannot be run as asked, or here, before anything is."""
    if asked.bars and (asked.verify or asked.ops or asked.shapes):
        raise ConfigError("--bars: takes --arch and --out alone; each of the ten has its own operators and shapes")
    if asked.verify and asked.offline and asked.shapes:
        raise ConfigError("--shapes: --offline --verify has one shape, [4096, 4096]")
    if not HAS_TRITON:
        raise ConfigError("triton is not installed; the kernels need it")
    if os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("CRYSTAL_KERNELS", "auto") != "auto":
        raise ConfigError(
            "crystal bench kernels: unset TRITON_INTERPRET and CRYSTAL_KERNELS, which choose other kernels"
        )
    if not (asked.offline or asked.bars or torch.cuda.is_available()):
        raise ConfigError(WITHOUT_GPU)


def _shown(records: Iterable[dict], console: Console, words: str) -> list[dict]:
    """All records, each named on stderr as it comes."""
    found = []
    with Bar(console, words) as bar:
        for record in records:
            found.append(record)
            keys = ("provider", "op", "shape", "direction", "dtype", "number", "what")
            bar.advance(what=f"{words}: {' '.join(str(record[key]) for key in keys if key in record)}")
    return found


def _compile(arch: int, ops, shapes: tuple[str, ...], console: Console) -> dict:
    from crystal.kernels.bench.compiled import DEVICES, rows
    from crystal.kernels.bench.environment import versions

    found = _shown(rows(arch, ops, shapes=lambda name: name in shapes), console, "compiled")
    return {"measured": False, "device": DEVICES[arch], "versions": versions(), "rows": found}


def _bars(arch: int, console: Console) -> dict:
    from crystal.kernels.bench.bars import bars
    from crystal.kernels.bench.compiled import DEVICES
    from crystal.kernels.bench.environment import versions

    found = _shown((bar.record() for bar in bars(arch)), console, "bar")
    verdict = "PASS" if all(bar["verdict"] == "PASS" for bar in found) else "FAIL"
    return {"measured": False, "device": DEVICES[arch], "versions": versions(), "bars": found, "verdict": verdict}


def _verify(offline: bool, ops, shapes, console: Console) -> dict:
    from crystal.kernels.bench.environment import device, versions
    from crystal.kernels.bench.verified import ON_CPU, ON_GPU, errors_on_cpu, errors_on_gpu, worst

    errors = errors_on_cpu(ops, DTYPES) if offline else errors_on_gpu(ops, shapes, DTYPES)
    times = ON_CPU if offline else ON_GPU
    found = _shown((worst(*error, times) for error in errors), console, "checked")
    verdict = "PASS" if all(row["passed"] for row in found) else "FAIL"
    where = "CPU, from the TTIR" if offline else device()
    return {
        "measured": not offline, "device": where, "versions": versions(), "rows": found, "verdict": verdict,
        "times_torchs_error": times,
    }  # fmt: skip


def _measure(ops, shapes, out: Path | None, console: Console) -> dict:
    from crystal.kernels.bench.environment import clocks, device, versions
    from crystal.kernels.bench.measured import SHAPES, CopySpeed, rows
    from crystal.kernels.bench.tables import draw
    from crystal.kernels.bench.timing import CudaTimer

    timer = CudaTimer()
    with torch.cuda.stream(timer.stream):
        before, speed = clocks(), CopySpeed(timer, "cuda")
        copy = speed(1 << 30)
        note(console, f"{device()['name']}: a copy of 512 MiB moves {copy / 1e9:.0f} GB/s, read and written")
        found = _shown(rows(timer, "cuda", speed, ops, shapes or SHAPES), console, "measured")
    verdict = "FAIL" if any(row["provider"] == "ours" and "failed" in row for row in found) else "PASS"
    result = {
        "measured": True, "device": device(), "clocks": {"before": before, "after": clocks()},
        "versions": versions(), "copy_gb_s": copy / 1e9, "rows": found, "verdict": verdict,
    }  # fmt: skip
    if out is not None:
        draw(found, out / "kernels.png", title(result))
    return result


def title(result: dict) -> str:
    """What was measured, and with what."""
    return f"{result['device']['name']}, copy {result['copy_gb_s']:.0f} GB/s, {listed(result['versions'])}"


def listed(versions: dict[str, str]) -> str:
    """`torch 2.14.1, triton 3.8.0`."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
