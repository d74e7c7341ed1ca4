"""Audit and coordinate check of the zoo's models: the families that crystal/mup checks, built as in training.

The initial weights, the optimizer groups and the forward pass are those that a run uses, not copies of them.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from crystal.backends.config import OptimizerConfig
from crystal.config import ConfigError, find, nearest, parse
from crystal.mup.audit import audit
from crystal.mup.audit_depth import audit_depth
from crystal.mup.plan import Plan
from crystal.mup.rules import PARAMETRIZATIONS
from crystal.mup.verdict import Report, Verdict, overall, summary
from crystal.zoo.build import RESIDUAL_OUT, build, initial_weights, multipliers_for, plan_for
from crystal.zoo.config import ModelConfig, MupConfig, families, preset, presets, with_width
from crystal.zoo.decoder import Decoder


@dataclass(frozen=True)
class Checked:
    """A model to check: its config, the optimizer's settings, and the name it goes by."""

    name: str
    config: ModelConfig
    optimizer: OptimizerConfig

    def at(self, width: int, depth: int | None = None) -> ModelConfig:
        """The config at another width (and depth). Raises ConfigError where no such width exists."""
        config = with_width(self.config, width)
        return config if depth is None else config.model_copy(update={"n_layers": depth})

    def plan(self, config: ModelConfig) -> Plan:
        return _plan(config, self.optimizer)

    def model(self, config: ModelConfig, seed: int = 1, device: str | torch.device = "cpu") -> Decoder:
        """The decoder with its initial weights (on meta: with what would be drawn)."""
        plan = self.plan(config)
        decoder = build(config, plan).to_empty(device=device)
        weights = dict(decoder.named_parameters())
        with torch.no_grad():
            for name, tensor in initial_weights(plan, seed):
                weights[name].copy_(tensor)
        return decoder

    def adamw(self, model: nn.Module, config: ModelConfig, lr: float = 1.0) -> torch.optim.AdamW:
        """The optimizer with a run's groups."""
        groups = self.plan(config).parameter_groups(model, lr)
        mixed = len({type(p) for p in model.parameters()}) > 1  # sharded and whole tensors are updated one by one
        how = {"foreach": False} if mixed else {"fused": True}
        return torch.optim.AdamW(groups, betas=self.optimizer.betas, **how)


@cache
def _plan(config: ModelConfig, optimizer: OptimizerConfig) -> Plan:
    return plan_for(
        config,
        weight_decay=optimizer.weight_decay,
        decay_vectors=optimizer.decay_norms_and_biases,
        eps=optimizer.eps,
    )


def checked(name: str, parametrization: str | None = None) -> Checked:
    """A preset, a rung of a ladder, a family (its proxy), or a run file, by name.

    parametrization: build it under another one than it declares. Raises ConfigError for an unknown name.
    """
    if name.endswith((".yaml", ".yml")) or Path(name).is_file() or not _is_model(name):
        from crystal.run import load_run

        try:
            find(name, "runs")
        except ConfigError:
            if not name.endswith((".yaml", ".yml")):
                known = [*presets(), *families()]
                raise ConfigError(f"{name}: expected a model or a run file{nearest(name, known)}") from None
            raise
        run = load_run(name).config
        config, optimizer = run.model, run.optimizer
    else:
        source = preset(f"{name}-proxy" if name in families() and name not in presets() else name)
        config = parse(ModelConfig, source.mapping["model"], source, ("model",))
        optimizer = parse(OptimizerConfig, source.mapping.get("optimizer", {}), source, ("optimizer",))
    if parametrization is not None:
        config = config.model_copy(update={"mup": reparametrized(config, parametrization)})
    return Checked(name, config, optimizer)


def _is_model(name: str) -> bool:
    from crystal.zoo.config import LADDER

    rung = LADDER.fullmatch(name)
    return name in presets() or name in families() or (rung is not None and rung["family"] in families())


def reparametrized(config: ModelConfig, parametrization: str) -> MupConfig:
    """The same tuned constants under other rules; completep's base depth becomes the model's own."""
    if parametrization not in PARAMETRIZATIONS:
        raise ConfigError(f"--parametrization: expected one of {', '.join(PARAMETRIZATIONS)}, got {parametrization}")
    update: dict = {"parametrization": parametrization}
    if parametrization == "completep":
        # Table 1 has no 1/sqrt(2L): its branch multiplier m_L^-alpha does that work
        update |= {"base_n_layers": config.mup.base_n_layers or config.n_layers, "residual_init_2l": False}
    return config.mup.model_copy(update=update)


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
