"""`crystal audit`, `coord-check`, `transfer`: is muP right, and do hyperparameters carry over. Imports when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crystal import completion
from crystal.options import Json, Overrides, console, print_result

Parametrization = Annotated[
    Literal["sp", "mup", "crystalcoder", "completep"] | None,
    typer.Option(help="check this parametrization instead of the model's own"),
]


Checked = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RUN.yaml", help="a preset, rung, family or run file", autocompletion=completion.checked
    ),
]


def audit(
    model: Checked,
    base: Annotated[int | None, typer.Option(min=1, metavar="N", help="base width; default: the config's")] = None,
    parametrization: Parametrization = None,
    as_json: Json = False,
) -> None:
    """Static muP audit on meta tensors: init, LR, decay, eps and multipliers of every tensor against the rules.

    Examples:
        crystal audit crystalcoder-7b
        crystal audit amber --parametrization mup --base 64
    """
    from crystal.checks.audit import audit_dict, audit_model, audit_text

    report, plan = audit_model(model, base, parametrization)
    print_result(audit_dict(report, plan), as_json, audit_text(model, report, plan))
    if report.verdict != "PASS":
        raise typer.Exit(1)


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
    as_json: Json = False,
) -> None:
    """Coordinate check with a verdict for every tensor and activation, over widths x seeds x steps.

    Examples:
        crystal coord-check crystalcoder --out check
        crystal coord-check amber --parametrization mup --widths 64,128,256,512
    """
    from crystal.check_command import run_check

    result, shown = run_check(
        model, widths, depths, seeds, steps, parametrization, lr, dtype, data, under, out, formats, console()
    )
    print_result(result, as_json, shown)
    if result["verdict"] != "PASS":
        raise typer.Exit(1)


def transfer(
    sweep: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP.yaml", help="a sweep file, or the name of a packaged one", autocompletion=completion.sweeps
        ),
    ],
    overrides: Overrides = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="size the sweep; no data needed")] = False,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="processes, one thread each")] = 2,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where trials and results go; default: sweeps/NAME")
    ] = None,
    as_json: Json = False,
) -> None:
    """Sweep hyperparameters over widths, or go on with it; say whether they transfer; write the target's run file.

    Examples:
        crystal transfer transfer-mup --plan-only
        crystal transfer mine.yaml --workers 4 --out sweeps/mine
    """
    from crystal.sweeps import transfer as transfer_command

    if plan_only:
        from crystal.sweeps.sweep import load_sweep

        plan = transfer_command.plan_only(load_sweep(sweep, tuple(overrides or ()), out), workers)
        print_result(plan, as_json, transfer_command.plan_text(plan))
        return
    result, shown = transfer_command.transfer(sweep, overrides or [], workers, out, console())
    print_result(result, as_json, shown)
    if result["verdict"] != "PASS":
        raise typer.Exit(1)
