"""The static audit: does a model do, tensor by tensor, what its parametrization says?

The model is built on meta at three widths: base, target, and a second one that tells a width from a number that
happens to be equal. From the real objects come every tensor's role (by which of its dimensions grow), what the
initialiser draws, which optimizer group it is in, and what the forward pass multiplies. The exponent of each in
the width multiplier is compared with the rule's. Seconds for a 7B, nothing is trained, and the two faults that
activations hide (1/sqrt(d) attention and a readout / sqrt(m), which look *better* than right ones in the first
steps) are as visible as any other.

A weight used as A*w, drawn with B and trained with lr C by an Adam-type optimizer behaves the same as
A*t, B/t, C/t (Yang et al. 2022, Lemma J.1), so only A*B and A*C are held to the rule: the paper's Tables 3, 8 and 9
all pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import mup
from torch import nn
from torch.optim import Optimizer

from crystal.mup.observe import Group, Observed, observe
from crystal.mup.plan import Layouts, Plan, PlanError, infshapes_of, layouts_of, role_of, uses_of
from crystal.mup.rules import PARAMETRIZATIONS, Parametrization, Role
from crystal.mup.tolerances import AUDIT_EXPONENT, AUDIT_VALUE
from crystal.mup.verdict import CheckError, Report, Row, explain


def audit(
    factory: Callable[[int], nn.Module],
    *,
    width: int,
    base_width: int,
    second_width: int | None = None,
    parametrization: str = "mup",
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    calls: Mapping[str, Callable[[nn.Module], Any]] | None = None,
    weight_decay: str | None = None,
    layouts: Layouts | None = None,
    plan: Plan | None = None,
    attention_power: float | None = -1.0,
    scores_scale: float | None = None,
) -> Report:
    """Audit a family of models.

    factory: width → module, initialised as in training; it is called under torch.device("meta"), so any size goes.
    optimizer: module → its real optimizer (nothing is stepped). calls: name → one forward pass of the module on
    inputs that it makes itself, such as {"training": …, "inference": …}; every call must apply the same multipliers.
    second_width: another width, by default twice the base. weight_decay: "coupled" (one lambda), "independent"
    (lambda * m where lr is / m), None: either, but all hidden matrices alike. layouts: (fan_in, fan_out) dimensions
    of tensors that no Linear, Embedding or Conv holds. plan: exact numbers of the target, for an optimizer of base
    lr 1. attention_power: of the scores' scale in d_head, where d_head grows; None: not judged. scores_scale: its exact
    value at the target's width.
    Raises CheckError where the family cannot be built so.
    """
    began = time.perf_counter()
    second = second_width or 2 * base_width
    if len({width, base_width, second}) < 2 or second == base_width:
        raise CheckError(f"widths: expected a base, a second and a target that differ, got {base_width}, {second}")
    rules = PARAMETRIZATIONS[parametrization]
    seen = {w: observe(lambda w=w: factory(w), optimizer, calls) for w in {base_width, second, width}}
    base = seen[base_width]
    try:
        known = layouts_of(base.model, layouts)
    except PlanError as error:
        name, _, message = str(error).partition(":")
        row = Row(name, "role", None, None, None, "FAIL", rules.source, f"{name}: cannot be classified:{message}")
        return Report([row], time.perf_counter() - began)
    rows: list[Row] = []
    for other in sorted({second, width} - {base_width}):
        shapes = infshapes_of(seen[other].model, base.model, seen[second].model)
        rows += _compare(base, seen[other], shapes, known, rules, weight_decay, attention_power, (base_width, other))
        rows += _ties_agree(seen[other].model, shapes, rules)
    rows = _worst(rows)
    if calls:
        rows += _calls_agree(seen[width])
    if plan is not None:
        rows += _against_plan(seen[width], plan)
    if scores_scale is not None:
        rows += _scores_are(seen[width], scores_scale)
    return Report(rows, time.perf_counter() - began)


def _compare(
    base: Observed,
    other: Observed,
    shapes: dict[str, mup.InfShape],
    layouts: dict,
    rules: Parametrization,
    decay_mode: str | None,
    attention_power: float | None,
    widths: tuple[int, int],
) -> list[Row]:
    """Rows of every tensor for one pair of widths."""
    rows = []
    first = next(n for n in shapes if layouts[n] is not None)
    m_model = next((shapes[n].width_mult() for n in shapes if _role(n, shapes, layouts) == "embedding"), None)
    m_model = m_model or shapes[first].width_mult()
    modes = _decay_modes(base, other, m_model)
    usual = decay_mode or (max(set(modes.values()), key=list(modes.values()).count) if modes else "coupled")
    for name in shapes:
        try:
            role = role_of(name, shapes[name], layouts[name])
        except PlanError as error:
            rows.append(Row(name, "role", None, None, None, "FAIL", rules.source, str(error)))
            continue
        own = shapes[name][layouts[name][0]].width_mult() if role == "hidden" else shapes[name].width_mult()
        m = own if rules.own_fan_in else m_model
        rows.append(Row(name, "role", None, None, None, "PASS", role))
        rows += _Tensor(name, role, m, m_model, base, other, rules, usual, widths).rows()
    return rows + _attention(base, other, rules, attention_power)


def _ties_agree(model: nn.Module, shapes: dict[str, mup.InfShape], rules: Parametrization) -> list[Row]:
    """A tensor that is tied between roles has one init and one lr, so the rules of both must ask for the same."""
    rows = []
    for name, layouts in uses_of(model).items():
        roles = sorted({role_of(name, shapes[name], layout) for layout in layouts})
        asked = {(rules.powers[r].init, rules.powers[r].lr) for r in roles}
        if len(asked) > 1:
            each = ", ".join(f"{r}: init m^{rules.powers[r].init:g}, lr m^{rules.powers[r].lr:g}" for r in roles)
            message = f"{name}: tied between roles that {rules.source} treats differently ({each})"
            rows.append(Row(name, "role", None, None, None, "FAIL", rules.source, message))
    return rows


def _role(name: str, shapes: dict, layouts: dict) -> Role | None:
    try:
        return role_of(name, shapes[name], layouts[name])
    except PlanError:
        return None


class _Tensor:
    """One tensor at two widths: exponents found and expected."""

    def __init__(self, name, role, m, m_model, base, other, rules, decay_mode, widths):
        self.name, self.role, self.m, self.m_model = name, role, m, m_model
        self.base, self.other, self.rules, self.decay_mode, self.widths = base, other, rules, decay_mode, widths
        self.power = rules.powers[role]

    def rows(self) -> list[Row]:
        init = self._init()
        groups = [None if o.groups is None else o.groups.get(self.name) for o in (self.base, self.other)]
        lr = None if None in groups else self._exponent(groups[0].lr, groups[1].lr, self.m)
        forward = self._forward()
        expected = {"init": self.power.init, "lr": self.power.lr}
        # A*B and A*C decide; a tensor that is used twice (tied) must satisfy the rule of each of its uses
        products = [
            (a - a0 + got - want)
            for a, a0, _ in forward or [(0.0, 0.0, "")]
            for got, want in ((init, self.power.init), (lr, self.power.lr))
            if got is not None
        ]
        same = bool(products) and all(abs(p) < AUDIT_EXPONENT for p in products)
        single = [("init", init), ("lr", lr)]
        rows = [self._row(q, got, expected[q], same, groups[1]) for q, got in single if got is not None]
        rows += [self._row("forward", a, a0, same, groups[1], use) for a, a0, use in forward]
        if self._kinds_differ():
            kinds = [str(o.draws[self.name]) for o in (self.base, self.other)]
            message = f"{self.name}: drawn as {kinds[0]} at width {self.widths[0]} and {kinds[1]} at {self.widths[1]}"
            rows.append(Row(self.name, "init", None, None, None, "FAIL", self.rules.source, message))
        elif (draw := self.other.draws[self.name]).kind in ("unknown", "none"):
            message = f"{self.name}: its initialiser could not be read (drawn as: {draw.kind}); coord-check measures it"
            rows.append(Row(self.name, "init", None, None, None, "INCONCLUSIVE", self.rules.source, message))
        if self.other.groups is not None:
            rows += self._decay(*groups) if None not in groups else [self._not_optimized()]
        return rows

    def _init(self) -> float | None:
        draws = [o.draws[self.name] for o in (self.base, self.other)]
        return self._exponent(draws[0].std, draws[1].std, self.m) if all(d.std > 0 for d in draws) else None

    def _kinds_differ(self) -> bool:
        a, b = (o.draws[self.name] for o in (self.base, self.other))
        return a.kind != b.kind or (a.kind == "constant" and a.mean != b.mean)

    def _forward(self) -> list[tuple[float, float, str]]:
        """(exponent, expected, use) of every use and call."""
        found = []
        for call, multipliers in self.other.multipliers.items():
            for (name, use), factors in multipliers.outputs.items():
                before = self.base.multipliers[call].outputs.get((name, use), frozenset())
                if name != self.name or len(before) != len(factors):
                    continue
                role = "output" if use == "matmul" and self.role in ("output", "embedding") else self.role
                m = self.m_model if role == "output" else self.m
                for a, b in zip(sorted(before), sorted(factors), strict=True):
                    if not (math.isnan(a) or math.isnan(b)):
                        found.append((self._exponent(a, b, m), self.rules.powers[role].forward, use))
        return sorted(set(found))

    def _decay(self, base: Group, other: Group) -> list[Row]:
        if base.weight_decay == other.weight_decay == 0:
            return []
        expected = -self.power.lr if self.decay_mode == "independent" else 0.0
        if 0 in (base.weight_decay, other.weight_decay):
            found = math.inf
        else:
            found = self._exponent(base.weight_decay, other.weight_decay, self.m)
        return [self._row("weight decay", found, expected, False, other)]

    def _not_optimized(self) -> Row:
        message = f"{self.name}: is in no optimizer group, so it is never updated"
        return Row(self.name, "lr", None, None, None, "FAIL", self.rules.source, message)

    @staticmethod
    def _exponent(before: float, after: float, m: float) -> float:
        return 0.0 if m == 1 else math.log(after / before) / math.log(m) + 0.0

    def _row(self, quantity, found, expected, equivalent, group: Group | None, use: str = "") -> Row:
        source = self.rules.source
        if self.m == 1 or abs(found - expected) < AUDIT_EXPONENT:
            return Row(self.name, quantity, found, (found, found), expected, "PASS", source)
        if equivalent:
            note = f"{self.name}: {quantity} ∝ m^{found:z.2f}, equal to {source} by abc-symmetry"
            return Row(self.name, quantity, found, (found, found), expected, "PASS", source, note)
        role = "output" if use == "matmul" and self.role != "hidden" else self.role
        why = explain(quantity, role, found, expected, None if group is None else group.number)
        message = (
            f"{self.name}: {quantity} ∝ m^{found:z.2f} from width {self.widths[0]} to {self.widths[1]}, "
            f"expected m^{expected:g} ({role}): {why}"
        )
        return Row(self.name, quantity, found, (found, found), expected, "FAIL", source, message)


def _decay_modes(base: Observed, other: Observed, m: float) -> dict[str, str]:
    """Of each tensor with a scaled lr: does its weight decay stay (coupled) or grow as lr falls (independent)?"""
    if base.groups is None or other.groups is None or m == 1:
        return {}
    modes = {}
    for name, before in base.groups.items():
        after = other.groups.get(name)
        if after and before.weight_decay and after.weight_decay and not math.isclose(before.lr, after.lr):
            modes[name] = "coupled" if math.isclose(before.weight_decay, after.weight_decay) else "independent"
    return modes


def _attention(base: Observed, other: Observed, rules: Parametrization, power: float | None) -> list[Row]:
    """The scores' scale against d_head. With d_head fixed, as in a ladder of heads, any constant is right."""
    rows = []
    for call, multipliers in other.multipliers.items():
        for pair, (factors, d_head) in multipliers.scores.items():
            before, d_base = base.multipliers[call].scores.get(pair, (frozenset(), 0))
            if power is None or not before or len(before) != len(factors) or any(map(math.isnan, factors)):
                continue
            expected = power if rules.name != "sp" else -0.5
            name = pair[0] if pair[0] == pair[1] else f"{pair[0]} · {pair[1]}"
            change = math.log(max(factors) / max(before))
            if d_head == d_base:
                expected, found = 0.0, change
                message = f"{name}: the scores' scale goes {max(before):.4g} → {max(factors):.4g} with d_head unchanged"
            else:
                found = change / math.log(d_head / d_base)
                why = explain("attention", None, found, expected)
                message = f"{name}: scores ∝ d_head^{found:z.2f} as d_head goes {d_base} → {d_head}: {why}"
            if abs(found - expected) < AUDIT_EXPONENT:
                rows.append(Row(name, "attention", found, (found, found), expected, "PASS", rules.source))
                continue
            rows.append(Row(name, "attention", found, (found, found), expected, "FAIL", rules.source, message))
    return rows


def _worst(rows: list[Row]) -> list[Row]:
    """One row of each tensor and quantity: that of the pair of widths that says the worst."""
    order = {"PASS": 0, "INCONCLUSIVE": 1, "FAIL": 2}
    kept: dict[tuple, Row] = {}
    for row in rows:
        key = (row.name, row.quantity, row.expected)
        if key not in kept or order[row.verdict] >= order[kept[key].verdict]:
            kept[key] = row
    return list(kept.values())


def _calls_agree(seen: Observed) -> list[Row]:
    """Training, inference and whatever else was called apply the same multipliers."""
    (first, reference), *others = seen.multipliers.items()
    rows = []
    for call, multipliers in others:
        for key in reference.outputs.keys() & multipliers.outputs.keys():
            a, b = reference.outputs[key], multipliers.outputs[key]
            if a != b and not any(map(math.isnan, a | b)):
                message = f"{key[0]}: {first} multiplies by {_list(a)}, {call} by {_list(b)}: one skips a multiplier"
                rows.append(Row(key[0], "forward", None, None, None, "FAIL", "one model", message))
        for key in reference.scores.keys() & multipliers.scores.keys():
            a, b = reference.scores[key][0], multipliers.scores[key][0]
            if a != b:
                message = f"{key[0]}: {first} scales scores by {_list(a)}, {call} by {_list(b)}"
                rows.append(Row(key[0], "attention", None, None, None, "FAIL", "one model", message))
    return rows


def _against_plan(seen: Observed, plan: Plan) -> list[Row]:
    """The real numbers of the target against the plan's."""
    rows = []
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
        for multipliers in seen.multipliers.values():
            for use in ("lookup", "matmul"):
                factors = multipliers.outputs.get((row.tensor, use))
                tied = row.role == "embedding" and use == "matmul"
                wanted = plan.logits_multiplier if tied else row.forward_multiplier
                if factors:
                    actual[f"forward ({use})"] = (max(factors), wanted)
        rows += [_exact(row.tensor, q, got, want, row.rule, group) for q, (got, want) in actual.items()]
    return rows


def _scores_are(seen: Observed, scale: float) -> list[Row]:
    found = {(pair[0], max(f)) for m in seen.multipliers.values() for pair, (f, _) in m.scores.items()}
    return [_exact(name, "attention", got, scale, "scores' scale", None) for name, got in sorted(found)]


def _exact(name: str, quantity: str, got: float, want: float, rule: str, group: Group | None) -> Row:
    if math.isclose(got, want, rel_tol=AUDIT_VALUE):
        return Row(name, f"{quantity} value", None, None, None, "PASS", rule)
    where = f" (optimizer group {group.number})" if group and quantity in ("lr", "weight decay", "eps") else ""
    message = f"{name}: {quantity} is {got:.6g}, the plan says {want:.6g}{where}"
    return Row(name, f"{quantity} value", None, None, None, "FAIL", rule, message)


def _list(factors: frozenset[float]) -> str:
    return ", ".join(f"{f:.6g}" for f in sorted(factors))
