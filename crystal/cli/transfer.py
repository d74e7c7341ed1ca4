"""`crystal transfer`: sweep a proxy, and carry its hyperparameters over. Imports when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crystal.cli import completion
from crystal.cli.options import Json, Overrides, console, print_result


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
    from crystal.sweeps import transfer as sweeps

    if plan_only:
        from crystal.sweeps.sweep import load_sweep

        plan = sweeps.plan_only(load_sweep(sweep, tuple(overrides or ()), out), workers)
        print_result(plan, as_json, plan_text(plan))
        return
    result = sweeps.transfer(sweep, overrides or [], workers, out, console())
    print_result(result, as_json, transfer_text(result))
    if result["verdict"] != "PASS":
        raise typer.Exit(1)


def plan_text(plan: dict) -> str:
    """The sweep on paper: a line a proxy, hours here and on the machine of the documented sweep."""
    from crystal.sweeps.transfer import EFFICIENCY

    lines = [
        f"{'width':>6} {'depth':>5} {'parameters':>12} {'tokens':>10} {'tokens/param':>12} {'trials':>6} {'FLOPs':>9}"
    ]
    lines += [
        f"{p['width']:>6} {p['depth']:>5} {p['parameters']:>12,} {p['tokens']:>10,} {p['tokens_per_parameter']:>12g} "
        f"{p['trials']:>6} {p['flops']:>9.2g}"
        for p in plan["proxies"]
    ]
    machine, reference = plan["machine"], plan["reference"]
    workers = f"{plan['workers']} worker{'s' * (plan['workers'] > 1)}"
    lines += [
        f"{plan['sweep']}: {plan['trials']} trials, {plan['tokens']:,} tokens, {plan['flops']:.3g} FLOPs",
        f"here: about {plan['hours_estimated']:.2g} hours with {workers}, at {EFFICIENCY:.0%} of the "
        f"{machine['matmul_flops_per_second'] / 1e9:.3g} GFLOP/s that a {machine['dtype']} product reached just now "
        f"on {machine['threads']} thread of {machine['processor']}",
        f"reference: {reference['hours']:.2g} hours with {workers}, at the "
        f"{reference['flops_per_second'] / 1e9:.3g} GFLOP/s a worker of {reference['sweep']} on {reference['machine']}",
    ]
    return "\n".join(lines + [f"warning: {w}" for w in plan["warnings"]])


def transfer_text(result: dict) -> str:
    """Verdicts, each width's optimum, the forecast, and what was written."""
    lines = []
    for r in (result, *result["beside"].values()):
        lines.append(f"{r['verdict']}  {r['parametrization']}: {r['message']}")
        for width, o in r["widths"].items():
            lines.append(
                f"  width {width:>5}: log2 lr* {o['log2_lr_optimum']:+.2f} [{o['ci'][0]:+.2f}, {o['ci'][1]:+.2f}]"
                f"  loss {o['loss']:.4f}{'  ' + o['edge'] if o['edge'] else ''}"
            )
    if len(result["depths"]) > 1:
        lines += [f"depth {d}: {r['verdict']}  {r['message']}" for d, r in result["depths"].items()]
    if "forecast" in result:
        f = result["forecast"]
        lines.append(
            f"forecast of width {f['held_out_width']} from the narrower ones: {f['predicted']:.4f} "
            f"[{f['interval'][0]:.4f}, {f['interval'][1]:.4f}], measured {f['measured']:.4f}"
        )
    lines += [f"written: {result[k]}" for k in ("target", "plot") if k in result]
    return "\n".join(lines)
