"""`crystal audit`: the static check of a model or a run, on meta tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crystal.checks.subject import checked
from crystal.errors import ConfigError
from crystal.mup.audit import audit
from crystal.mup.audit_depth import audit_depth
from crystal.mup.plan import Plan
from crystal.mup.verdict import CheckError, Report
from crystal.zoo.build import RESIDUAL_OUT, multipliers_for


def audit_model(
    name: str, base: int | None = None, parametrization: str | None = None, accept: Sequence[str] = ()
) -> tuple[Report, Plan]:
    """The static audit of a model or run, against its own plan; parametrization: what it is expected to be.

    Raises ConfigError for a model or base width that does not exist or cannot be audited.
    """
    try:
        return _audited(name, base, parametrization, tuple(accept))
    except CheckError as error:
        raise ConfigError(f"{name}: {error}") from None


def _audited(name: str, base: int | None, parametrization: str | None, accept: tuple[str, ...]) -> tuple[Report, Plan]:
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
        accept=accept,
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
        rows, seconds = report.rows + over_depth.rows, report.seconds + over_depth.seconds
        report = Report(rows, seconds, report.notes, accept=accept)
    return report, plan


def audit_dict(report: Report, plan: Plan) -> dict:
    """JSON: the report, and the plan that it was held against."""
    return report.as_dict() | {"plan": plan.as_dict()}
