"""What `crystal coord-check` does with its flags: one check, its companion for the picture, and where it runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.checks.coord_check import DEPTH, WIDTHS, Asked, as_dict, check_beside, check_model, text, write
from crystal.config import ConfigError
from crystal.mup.coord_check import MIN_SEEDS
from crystal.output.interrupts import finishing
from crystal.output.progress import Bar
from crystal.run import load_run, prepare_run

if TYPE_CHECKING:
    from rich.console import Console


def run_check(
    model: str,
    widths: str | None,
    depths: str | None,
    seeds: int | None,
    steps: int,
    parametrization: str | None,
    lr: float | None,
    dtype: str,
    data: str | None,
    under: str | None,
    out: Path | None,
    formats: str | None,
    console: Console,
) -> tuple[dict, str]:
    """(JSON object, text). under: compile, or fsdp or tp on two gloo processes. Raises ConfigError for a bad flag."""
    pictures = _formats(formats, out)
    if lr is not None and not 0 < lr < math.inf:
        raise ConfigError(f"--lr: expected a positive number, got {lr:g}")
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from None
    asked = Asked(
        widths=_sizes(widths, "--widths") or WIDTHS,
        depths=_sizes(depths, "--depths") or (DEPTH,),
        seeds=seeds,
        steps=steps,
        lr=lr,
        dtype=dtype,
        data=data,
    )
    if data is not None:
        prepare_run(load_run(data), console)  # before the bar: it draws its own
    with Bar(console, model, unit="models") as bar:
        progress = _shown_on(bar, model, asked, 1 + (out is not None))
        if under in ("fsdp", "tp"):
            from crystal.checks.sharded import check_sharded

            checks = check_sharded(model, asked, parametrization, under)
        else:
            if under == "compile":
                import torch

                asked = dataclasses.replace(asked, wrap=torch.compile)
            checks = check_model(model, asked, parametrization, progress)
        shown = text(checks, out)
        if out is not None:
            beside = check_beside(model, dataclasses.replace(asked, wrap=None), parametrization, progress)
            bar.begin(f"writing {out}")
            with finishing():
                files = write(checks, beside, out, f"Coordinate check of {model}", pictures)
            shown += "".join(f"\nwritten: {file}" for file in files)
    return as_dict(checks), shown


def _formats(given: str | None, out: Path | None) -> tuple[str, ...]:
    from crystal.mup.coord_plots import FORMATS

    if given is None:
        return ("png",)
    if out is None:
        raise ConfigError("--format: expected --out DIR beside it, for the pictures to go to")
    words = dict.fromkeys(word.strip().lower() for word in given.split(","))
    if unknown := [word for word in words if word not in FORMATS]:
        raise ConfigError(f"--format: expected {', '.join(FORMATS)}, or several of them, got {unknown[0] or given!r}")
    return tuple(words)


def _shown_on(bar: Bar, model: str, asked: Asked, checks: int) -> Callable[[int, int], None]:
    """What a check calls with (size, seed) before each model it trains. checks: how many there will be."""
    both = (asked.widths if len(asked.depths) == 1 or asked.widths != WIDTHS else ()), asked.depths[1:] and asked.depths
    expected = sum(map(len, both)) * (asked.seeds or MIN_SEEDS) * checks
    begun = 0

    def progress(size: int, seed: int) -> None:
        nonlocal begun
        if not begun:
            bar.begin(model, expected)
        bar.total = max(bar.total, begun + 1)  # more seeds where the verdict needs them
        bar.reach(begun, f"size {size}, seed {seed}: {model}")
        begun += 1

    return progress


def _sizes(given: str | None, flag: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    try:
        sizes = tuple(sorted({int(part) for part in given.split(",")}))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1:
        raise ConfigError(f"{flag}: expected positive whole numbers separated by commas, got {given}")
    if flag == "--widths" and len(sizes) < 3:
        raise ConfigError(f"{flag}: expected at least three widths, got {given}")
    if flag == "--depths" and len(sizes) == 2:
        raise ConfigError(f"{flag}: expected one depth, or at least three to check over, got {given}")
    return sizes
