"""`crystal audit`: is every tensor's init, LR, decay and multiplier what the rules say. Imports when it runs."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from crystal.cli.models import plan_table
from crystal.cli.options import Checked, Json, Parametrization, print_result

if TYPE_CHECKING:
    from crystal.mup.plan import Plan
    from crystal.mup.verdict import Report, Verdict


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
    from crystal.checks.audit import audit_dict, audit_model

    report, plan = audit_model(model, base, parametrization)
    print_result(audit_dict(report, plan), as_json, audit_text(model, report, plan))
    if report.verdict != "PASS":
        raise typer.Exit(1)


def audit_text(name: str, report: Report, plan: Plan) -> str:
    """Tensor by tensor, blocks that are alike folded into one line; then what is wrong."""
    from crystal.mup.verdict import overall, summary

    verdicts: dict[str, Verdict] = {}
    for row in report.rows:
        verdicts[row.name] = overall([row.verdict, verdicts.get(row.name, "PASS")])
    rows: dict[tuple, list] = {}
    for row in plan.tensors:
        kind = re.sub(r"\.\d+\.", ".*.", row.tensor)
        key = (kind, row.init_std, row.lr_multiplier, row.weight_decay, row.eps, verdicts.get(row.tensor))
        rows.setdefault(key, []).append(row)
    table = plan_table([asdict(same[0]) | {"tensor": key[0]} for key, same in rows.items()]).splitlines()
    marks = ["", *(f"{key[-1] or '':13}{len(same):>3} x " for key, same in rows.items())]
    width = max(map(len, marks))
    lines = [f"{mark:{width}}{line}" for mark, line in zip(marks, table, strict=True)]
    lines.append(
        f"model: embedding x {plan.embedding_multiplier:g}, logits x {plan.logits_multiplier:g}, residual branches x "
        f"{plan.residual_multiplier:g}; m = {plan.width_multiplier:g}"
    )
    checks = f"{len(report.rows)} checks of {len(plan.tensors)} tensors in {report.seconds:.1f} s"
    lines.append(f"{report.verdict}  {name}: {plan.parametrization}, {checks}")
    bad = [row for row in report.rows if row.verdict != "PASS"]
    said = summary(bad, 20)
    lines += [f"  {line}" for line in said]
    if len(bad) > len(said):
        lines.append(f"  all {len(bad)} rows that do not pass: --json")
    return "\n".join(lines)
