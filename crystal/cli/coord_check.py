"""`crystal coord-check`: one check, its companion for the picture, and where they run. Imports when it runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from crystal.cli.options import Accept, Checked, Json, Parametrization, console, is_own, print_result
from crystal.errors import ConfigError

if TYPE_CHECKING:
    from crystal.checks.coord_check import Asked
    from crystal.mup.coord_check import CoordCheck
    from crystal.mup.verdict import Row
    from crystal.output.progress import Bar


def coord_check(
    model: Checked,
    widths: Annotated[
        str | None, typer.Option(metavar="N,...", help="three widths or more; default: 64,128,256")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(metavar="N,...", help="one: the models' depth; several: check over depth instead")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="how many; default: as many as the verdict needs")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, metavar="N", help="updates that each model makes")] = 4,
    parametrization: Parametrization = None,
    lr: Annotated[
        float | None, typer.Option(metavar="X", help="base LR; default: a sixteenth of the base init sigma")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bf16", "fp32"], typer.Option(help="compute; auto: bf16 from width 512 on if faster")
    ] = "auto",
    data: Annotated[
        str | None, typer.Option(metavar="RUN.yaml", help="take rows of its token store instead of random ones")
    ] = None,
    under: Annotated[
        Literal["compile", "fsdp", "tp"] | None,
        typer.Option(help="run it under torch.compile, or sharded over two gloo processes"),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="write JSON, pictures and a page, SP beside")] = None,
    formats: Annotated[
        str | None, typer.Option("--format", metavar="NAME,...", help="of the pictures: png, pdf, svg; default: png")
    ] = None,
    accept: Accept = None,
    as_json: Json = False,
) -> None:
    """Coordinate check with a verdict for every tensor and activation, over widths x seeds x steps.

    Examples:
        crystal coord-check crystalcoder --out check
        crystal coord-check mymodule:factory --widths 64,128,256,512
    """
    from crystal.checks.coord_check import DEPTH, WIDTHS, Asked, as_dict
    from crystal.run import load_run, prepare_run

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
        accept=tuple(accept or ()),
    )
    if is_own(model):
        zoo_only = {"--depths": depths, "--lr": lr, "--data": data, "--under": under}
        for flag, value in (zoo_only | {"--dtype": None if dtype == "auto" else dtype}).items():
            if value is not None:
                raise ConfigError(f"{flag}: expected a model or run before it; {model} says itself how it trains")
        checks, files = _run_own(model, asked, parametrization, out, pictures)
    else:
        if data is not None:
            prepare_run(load_run(data), console())  # before the bar: it draws its own
        checks, files = _run(model, asked, parametrization, under, out, pictures)
    result = as_dict(checks)
    print_result(result, as_json, "\n".join([coord_check_text(checks, out), *(f"written: {file}" for file in files)]))
    if result["verdict"] != "PASS":
        raise typer.Exit(1)


def _run(
    model: str, asked: Asked, parametrization: str | None, under: str | None, out: Path | None, pictures: Sequence[str]
) -> tuple[list[CoordCheck], list[Path]]:
    """(checks, files written to `out`). under: compile, or fsdp or tp on two gloo processes."""
    from crystal.checks.coord_check import check_beside, check_model, write
    from crystal.output.interrupts import finishing
    from crystal.output.progress import Bar

    with Bar(console(), model, unit="models") as bar:
        progress = _shown_on(bar, model, asked, 1 + (out is not None))
        if under in ("fsdp", "tp"):
            from crystal.checks.sharded import check_sharded

            checks = check_sharded(model, asked, parametrization, under)
        else:
            if under == "compile":
                import torch

                asked = dataclasses.replace(asked, wrap=torch.compile)
            checks = check_model(model, asked, parametrization, progress)
        if out is None:
            return checks, []
        beside = check_beside(model, dataclasses.replace(asked, wrap=None), parametrization, progress)
        bar.begin(f"writing {out}")
        with finishing():
            return checks, write(checks, beside, out, f"Coordinate check of {model}", pictures)


def _run_own(
    model: str, asked: Asked, parametrization: str | None, out: Path | None, pictures: Sequence[str]
) -> tuple[list[CoordCheck], list[Path]]:
    """The same for a user's own models, with nothing beside them in the picture."""
    from crystal.checks.coord_check import write
    from crystal.checks.factory import load_factory
    from crystal.checks.own_models import check_own
    from crystal.output.interrupts import finishing
    from crystal.output.progress import Bar

    factory = load_factory(model)
    with Bar(console(), model, unit="models") as bar:
        checks = [check_own(factory, asked, parametrization, _shown_on(bar, model, asked, 1))]
        if out is None:
            return checks, []
        bar.begin(f"writing {out}")
        with finishing():
            return checks, write(checks, (), out, f"Coordinate check of {model}", pictures)


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
    from crystal.checks.coord_check import WIDTHS
    from crystal.mup.coord_check import MIN_SEEDS

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


def coord_check_text(checks: Sequence[CoordCheck], out: Path | None = None) -> str:
    """The verdict, what is wrong, and the range of exponents by quantity. out: where `write` puts all rows."""
    from crystal.checks.coord_check import stem
    from crystal.mup.verdict import overall, summary

    lines = []
    for check in checks:
        seeds = len({m.seed for m in check.measured})
        lines.append(
            f"{check.verdict}  {check.label}: {check.along}s {', '.join(map(str, check.sizes))}, {seeds} seeds, "
            f"{check.steps} steps, {check.seconds:.1f} s"
        )
        bad = check.failures or check.unsettled
        lines += [f"  {line}" for line in summary(bad)] if bad else []
        if len(bad) > len(summary(bad)):
            place = out / f"{stem(check)}.html" if out else "--json, or --out DIR for a page"
            lines.append(f"  all {len(bad)} {'failing' if check.failures else 'inconclusive'} rows: {place}")
        lines += [f"  note: {note}" for note in check.remarks()]
        lines.append(f"  {'quantity':12} {'rows':>5} {'expected':>9} {'slopes':>16}  verdict")
        for (quantity, expected), rows in _by_quantity(check.rows).items():
            slopes = [r.slope for r in rows if r.slope is not None]
            span = f"{min(slopes):+z.2f} … {max(slopes):+z.2f}" if slopes else ""
            lines.append(f"  {quantity:12} {len(rows):>5} {expected:>9} {span:>16}  {overall(r.verdict for r in rows)}")
    return "\n".join(lines)


def _by_quantity(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        expected = "" if row.expected is None else f"{row.expected:g}"
        found.setdefault((row.quantity, expected), []).append(row)
    return found
