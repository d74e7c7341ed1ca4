"""`crystal audit`: is every tensor's init, LR, decay and multiplier what the rules say. Imports when it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from crystal.cli.models import plan_table
from crystal.cli.options import Accept, Checked, Json, Parametrization, is_own, print_result
from crystal.errors import ConfigError

if TYPE_CHECKING:
    from crystal.mup.plan import Plan
    from crystal.mup.verdict import Report, Verdict


def audit(
    model: Checked,
    base: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="base width; default: the config's, or 64 for MODULE:NAME")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="target width of MODULE:NAME; default: 8 x base")
    ] = None,
    parametrization: Parametrization = None,
    accept: Accept = None,
    as_json: Json = False,
) -> None:
    """Static muP audit on meta tensors: init, LR, decay, eps and multipliers of every tensor against the rules.

    Examples:
        crystal audit crystalcoder-7b
        crystal audit mymodule:factory --base 64 --width 1024
    """
    if is_own(model):
        report, result, text = _own(model, base, width, parametrization, accept or ())
    elif width is not None:
        raise ConfigError(f"--width: expected MODULE:NAME before it; {model} has a width of its own")
    else:
        from crystal.checks.audit import audit_dict, audit_model

        report, plan = audit_model(model, base, parametrization, accept or ())
        result, text = audit_dict(report, plan), audit_text(model, report, plan)
    print_result(result, as_json, text)
    if report.verdict != "PASS":
        raise typer.Exit(1)


def _own(
    model: str, base: int | None, width: int | None, parametrization: str | None, accept: Sequence[str]
) -> tuple[Report, dict, str]:
    """(report, JSON, text) of a user's own models."""
    from crystal.checks.factory import load_factory
    from crystal.checks.own_models import audit_own
    from crystal.mup.report import report_text

    factory = load_factory(model)
    report = audit_own(factory, width, base, parametrization, accept)
    rules = parametrization or factory.parametrization
    return (
        report,
        report.as_dict(),
        report_text(report, f"{model}: {rules}, {len(report.rows)} checks in {report.seconds:.1f} s"),
    )


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
    bad = [row for row in report.rows if row.verdict != "PASS" and not report.accepted(row)]
    said = summary(bad, 20)
    lines += [f"  {line}" for line in said]
    if len(bad) > len(said):
        lines.append(f"  all {len(bad)} rows that do not pass: --json")
    lines += [f"  note: {note}" for note in report.remarks()]
    return "\n".join(lines)
