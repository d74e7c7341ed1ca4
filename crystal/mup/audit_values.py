"""The audit against exact numbers: a target's values beside those of its plan."""

from __future__ import annotations

import math
from collections.abc import Mapping

from crystal.mup.forward_trace import Trace, multipliers
from crystal.mup.observe import Observed
from crystal.mup.optimizers import Group
from crystal.mup.plan import Plan
from crystal.mup.tolerances import AUDIT_VALUE
from crystal.mup.verdict import Row


def against_plan(seen: Observed, traces: Mapping[str, Trace], width: int, plan: Plan) -> list[Row]:
    """The real numbers of the target against the plan's. width: the target's place in the traces."""
    rows = []
    followed = [multipliers(trace, width) for trace in traces.values()]
    for row in plan.tensors:
        draw = seen.draws[row.tensor]
        if row.init == "normal":
            actual = {"init": (draw.std, row.init_std), "init cut": (draw.cut or 0.0, row.init_cut or 0.0)}
        else:
            actual = {"init": (draw.mean if draw.kind == "constant" else math.nan, float(row.init == "ones"))}
        group = (seen.groups or {}).get(row.tensor)
        if group is not None:
            actual |= {"lr": (group.lr, row.lr_multiplier), "weight decay": (group.weight_decay, row.weight_decay)}
            actual |= {"eps": (group.eps, row.eps)}
        for found in followed:
            for use in ("lookup", "matmul"):
                factors = found.outputs.get((row.tensor, use))
                tied = row.role == "embedding" and use == "matmul"
                wanted = plan.logits_multiplier if tied else row.forward_multiplier
                if factors:
                    actual[f"forward ({use})"] = (max(factors), wanted)
        rows += [_exact(row.tensor, q, got, want, row.rule, group) for q, (got, want) in actual.items()]
    return rows


def scores_are(traces: Mapping[str, Trace], width: int, scale: float) -> list[Row]:
    """The scores' scale at the target's width."""
    followed = [multipliers(trace, width) for trace in traces.values()]
    found = {(pair[0], max(factors)) for m in followed for pair, (factors, _) in m.scores.items()}
    return [_exact(name, "attention", got, scale, "scores' scale", None) for name, got in sorted(found)]


def _exact(name: str, quantity: str, got: float, want: float, rule: str, group: Group | None) -> Row:
    if math.isclose(got, want, rel_tol=AUDIT_VALUE):
        return Row(name, f"{quantity} value", None, None, None, "PASS", rule)
    where = f" (optimizer group {group.number})" if group and quantity in ("lr", "weight decay", "eps") else ""
    message = f"{name}: {quantity} is {got:.6g}, the plan says {want:.6g}{where}"
    return Row(name, f"{quantity} value", None, None, None, "FAIL", rule, message)
