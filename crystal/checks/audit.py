"""`crystal audit`: the static check of a model or a run, on meta tensors."""

from __future__ import annotations

import re
from dataclasses import asdict

import torch
from torch import Tensor

from crystal.checks.subject import checked
from crystal.mup.audit import audit
from crystal.mup.audit_depth import audit_depth
from crystal.mup.plan import Plan
from crystal.mup.verdict import Report, Verdict, overall, summary
from crystal.zoo.build import RESIDUAL_OUT, multipliers_for


def audit_model(name: str, base: int | None = None, parametrization: str | None = None) -> tuple[Report, Plan]:
    """The static audit of a model or run, against its own plan; parametrization: what it is expected to be."""
    subject = checked(name)
    config = subject.config
    smallest = config.n_heads // config.kv_heads * config.d_head
    declared = config.mup.parametrization
    base = base or (config.mup.base_d_model if declared != "sp" else smallest)
    subject.at(base)  # a width that does not exist is the user's mistake, and is named as given
    plan = subject.plan(config)

    def ids() -> Tensor:
        return torch.zeros(1, 8, dtype=torch.int64)

    observed = {
        "optimizer": lambda model: subject.adamw(model, model.config),
        "calls": {
            "training": lambda model: model.loss(ids(), ids(), torch.ones(1, 8)),
            "inference": lambda model: model(ids()),
        },
    }
    itself = parametrization in (None, declared)
    report = audit(
        lambda width: subject.model(subject.at(width), device="meta"),
        width=config.d_model,
        base_width=base,
        parametrization=parametrization or declared,
        weight_decay=config.mup.weight_decay,
        plan=plan if itself else None,
        attention_power=-1.0 if config.mup.attention_scale == "1/d" else -0.5,
        scores_scale=multipliers_for(config, plan).attention if itself else None,
        **observed,
    )
    if (parametrization or declared) == "completep":
        over_depth = audit_depth(
            lambda depth: subject.model(subject.at(config.d_model, depth), device="meta"),
            depths=(config.mup.base_n_layers or config.n_layers, 2 * config.n_layers),
            alpha=config.mup.depth_alpha,
            residual_out=RESIDUAL_OUT,
            **observed,
        )
        report = Report(report.rows + over_depth.rows, report.seconds + over_depth.seconds, report.notes)
    return report, plan


def audit_dict(report: Report, plan: Plan) -> dict:
    """JSON: the report, and the plan that it was held against."""
    return report.as_dict() | {"plan": plan.as_dict()}


def audit_text(name: str, report: Report, plan: Plan) -> str:
    """Tensor by tensor, blocks that are alike folded into one line; then what is wrong."""
    from crystal.planning.describe import plan_table

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
