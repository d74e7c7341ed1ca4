"""`crystal models`: the presets, and everything about one."""

from __future__ import annotations

from typing import Annotated

import typer

from crystal.cli import completion
from crystal.cli.options import Json, print_result


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="a preset, or a rung such as crystalcoder-w256-l8", autocompletion=completion.models
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="also the parameter plan, a line a tensor")] = False,
    as_json: Json = False,
) -> None:
    """List the presets, or print one: config, exact parameter count, FLOPs per token, memory per backend.

    Examples:
        crystal models crystalcoder-7b
        crystal models crystalcoder-w256-l8 --plan
    """
    from crystal.planning import describe

    if name is None:
        listing = describe.listing()
        print_result(listing, as_json, listing_text(listing))
    else:
        model = describe.model(name, with_plan=plan)
        print_result(model, as_json, model_text(model))


def listing_text(result: dict) -> str:
    rows = [f"{m['name']:20} {m['parameters']:>15,} parameters" for m in result["models"]]
    rows += [f"{f + '-wWIDTH[-lLAYERS]':36} proxies, e.g. {f}-w256, {f}-w128-l8" for f in result["families"]]
    return "\n".join(rows)


def model_text(result: dict) -> str:
    config = {k: v for k, v in result["config"].items() if k != "mup"}
    lines = [
        f"{result['name']}: {result['parameters']:,} parameters, "
        f"{result['flops_per_token'] / 1e9:.3g} GFLOP/token (forward + backward, causal attention)",
        "memory without activations:",
        *(f"  {v / 1e9:8.2f} GB  {k}" for k, v in result["memory_bytes"].items()),
        *(f"  {key}: {value}" for key, value in config.items()),
        *(f"  mup.{key}: {value}" for key, value in result["config"]["mup"].items()),
    ]
    if "plan" in result:
        multipliers = ", ".join(f"{k.removesuffix('_multiplier')} x{v:g}" for k, v in result["multipliers"].items())
        lines += ["", multipliers, plan_table(result["plan"])]
    return "\n".join(lines)


def plan_table(rows: list[dict]) -> str:
    """The plan as text, a line a tensor; `out x`: what the forward pass multiplies the tensor's output with."""
    lines = [
        f"{'tensor':32} {'shape':>16} {'role':10} {'m':>8} {'init':>24} {'lr x':>8} {'wd':>5} {'eps':>7} {'out x':>8}  "
        "rule"
    ]
    for r in rows:
        init = r["init"] if r["init"] != "normal" else f"N({r['init_std']:.7g})"
        if r["init_cut"]:
            init += f" cut {r['init_cut']:.6g}"
        shape = "x".join(map(str, r["shape"]))
        lines.append(
            f"{r['tensor']:32} {shape:>16} {r['role']:10} {r['width_multiplier']:>8.6g} {init:>24} "
            f"{r['lr_multiplier']:>8.6g} {r['weight_decay']:>5g} {r['eps']:>7g} {r['forward_multiplier']:>8.6g}  "
            f"{r['rule']}"
        )
    return "\n".join(lines)
