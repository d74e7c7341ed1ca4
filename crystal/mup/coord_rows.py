"""The coordinate check's rows: measured sizes of tensors and activations, each held against what the rules expect."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from crystal.mup.equivalents import free_tensors, wrong_multipliers
from crystal.mup.expected import Expected, Tensors
from crystal.mup.measure import Measured
from crystal.mup.optimizers import Group
from crystal.mup.slopes import decide, fit_slope
from crystal.mup.tolerances import ACTIVATION, FEW, FEW_ELEMENTS, HIGH_LR, INIT_AND_UPDATE, LOW_LR, PUSH, SGD_UPDATE
from crystal.mup.verdict import EFFECTS, Row, explain


def judge(measured: Sequence[Measured], steps: int, expected: Expected) -> list[Row]:
    """A row for every tensor and activation: exponent, interval, verdict."""
    points: dict[tuple[str, str, int], dict[tuple[int, int], float]] = {}
    for m in measured:
        for (name, quantity, step), value in m.values.items():
            if quantity in ("update", "push"):
                step = 0  # the first, whenever it came
            elif quantity in ("size", "change") and step not in (1, steps):
                continue
            if expected.depth:
                name = by_depth(name, m.size, expected.blocks)
            points.setdefault((name, quantity, step), {})[m.size, m.seed] = value
    off = _off(points, expected)
    unmade = {n for n, (b, c) in off.items() if expected.tensors[n].multiplier and _table_8(expected.tensors[n], b, c)}
    shifts = {n: -t.multiplier for n, t in expected.tensors.items() if t.multiplier and n not in unmade}
    judging = _Judging(expected, shifts | free_tensors(expected, off), len(measured), measured[0].groups)
    wrong = wrong_multipliers(expected)
    for name in unmade:
        tensor = expected.tensors[name]
        asked = expected.rules.powers[tensor.used_as].forward
        role = expected.constraints.explained_as(name, tensor.used_as)
        wrong[name] = (role, asked + tensor.multiplier, asked)
    rows = [_multiplier(name, *wrong[name], expected.source) for name in sorted(wrong)]
    rows += [row for key, values in points.items() if (row := judging.row(key, values)) is not None]
    rows += _quiet_rows(measured, expected, rows)
    rows = _regime(rows, points, expected)
    order = {"init": 0, "update": 1, "multiplier": 2, "push": 3, "size": 4, "change": 5}
    return sorted(rows, key=lambda r: order[r.quantity.split()[0]])


def _off(points, expected: Expected) -> dict[str, tuple[float | None, float | None]]:
    """tensor → exponents by which init and first update differ from Table 8's."""
    found = {}
    for name in expected.tensors:
        both = []
        for quantity in ("init", "update"):
            slope = fit_slope(_beside(points.get((name, quantity, 0), {}), expected, expected.tensor(name, quantity)))
            both.append(None if slope is None else slope.value)
        found[name] = tuple(both)
    return found


def _table_8(tensor: Tensors, init: float | None, update: float | None) -> bool:
    """Are init and first update Table 8's, though the multiplier is not? (init, update: by which power they are off
    from what that multiplier asks for)"""
    return all(p is None or abs(p - tensor.multiplier) < 0.2 for p in (init, update)) and update is not None


def _multiplier(name: str, role: str, found: float, wanted: float, source: str) -> Row:
    """A forward multiplier that neither init nor LR makes up for, exact from the recorded forward pass."""
    why = explain("forward", role, found, wanted)
    message = f"{name}: forward ∝ width^{found:z.2f}, expected width^{wanted:.3g}: {why}"
    return Row(name, "multiplier", found, (found, found), wanted, "FAIL", source, message)


def _beside(values: dict, expected: Expected, logs: Sequence[float]) -> dict:
    """Sizes as multiples of what is expected of them."""
    scale = {size: math.exp(log) for size, log in zip(expected.sizes, logs, strict=True)}
    return {key: value / scale[key[0]] for key, value in values.items()}


def by_depth(name: str, depth: int, blocks: str) -> str:
    """A name that means the same at every depth: the last block's own number is left out."""
    return re.sub(rf"^{re.escape(blocks)}{depth - 1}(?=\.|$)", f"{blocks}last", name)


@dataclass(frozen=True)
class _Judging:
    """Turns measured points into rows. shifts: tensor → power by which its init and update should be off Table 8's, for
    a multiplier that makes up for it; runs: how many points a whole row has."""

    expected: Expected
    shifts: dict[str, float]
    runs: int
    groups: dict[str, Group]

    def row(self, key: tuple[str, str, int], values: dict) -> Row | None:
        name, quantity, step = key
        expected = self.expected
        if len(values) < self.runs or not expected.judges(name, quantity):  # or not there at every size
            return None
        label = quantity if step == 0 else f"{quantity} t={step}"
        logs = self.logs(name, quantity)
        if logs is None:
            return None
        slope = fit_slope(_beside(values, expected, logs))
        if slope is None:
            return _without_slope(name, label, values, expected)
        power = expected.power(logs)
        low, high, tolerance = self.range(name, quantity, step)
        verdict = decide(slope, low, high, tolerance)
        found = slope.value + power
        message = "" if verdict == "PASS" else self.message(name, quantity, label, found, high + power, verdict)
        interval = (slope.low + power, slope.high + power)
        return Row(name, label, found, interval, round(high + power, 2) + 0.0, verdict, expected.source, message)

    def logs(self, name: str, quantity: str) -> Sequence[float] | None:
        """What the rules expect at each size, as logs of ratios to the first; None: nothing."""
        expected = self.expected
        flat = (0.0,) * len(expected.sizes)
        if quantity in ("init", "update"):
            tensor = expected.tensors.get(name)
            shift = 0.0 if tensor is None else self.shifts.get(name, 0.0) + tensor.multiplier
            return [x + shift * y for x, y in zip(expected.tensor(name, quantity), self.width(), strict=True)]
        if expected.depth:
            return flat
        if quantity == "push":
            return [self.shifts.get(name, 0.0) * y for y in self.width()]
        power = expected.output(name, self.shifts)
        return None if power is None else [power * y for y in self.width()]

    def width(self) -> list[float]:
        return [math.log(size / self.expected.sizes[0]) for size in self.expected.sizes]

    def range(self, name: str, quantity: str, step: int) -> tuple[float, float, float]:
        """(lowest right exponent, highest, tolerance) beside what is expected."""
        if quantity in ("init", "update"):
            group = self.groups.get(name)
            if quantity == "update" and group is not None and group.rule == "sgd":
                # a gradient through scores that nothing correlates yet is smaller by width^-1/2
                return -0.5 if self.expected.in_scores(name) else 0.0, 0.0, SGD_UPDATE
            few = quantity == "init" and self.expected.elements.get(name, FEW) < FEW
            return 0.0, 0.0, FEW_ELEMENTS if few else INIT_AND_UPDATE
        return *self.expected.activation(name, quantity, step), PUSH if quantity == "push" else ACTIVATION

    def message(self, name: str, quantity: str, label: str, found: float, wanted: float, verdict: str) -> str:
        expected = self.expected
        tensor = expected.tensors.get(name)
        group = self.groups.get(name)
        number, rule = (None, None) if group is None else (group.number, group.rule)
        role = None if tensor is None else tensor.role
        why = explain(quantity, role, found, wanted, number, rule)
        if quantity in ("init", "update") and tensor is not None and role is None:
            why = "none of its dimensions grows, so it should be the same at every width"
        if expected.depth:
            why = _DEPTH.get(quantity, "the residual stream grows with depth: branches want x m_L^-alpha")
            why = why if quantity in _DEPTH or found > 0 else "the residual stream dies out with depth"
        along = "depth" if expected.depth else "width"
        why = why if verdict == "FAIL" else "more seeds or widths would tell"
        what = {"init": "init", "update": "first update", "push": "effect of the first update"}.get(quantity, label)
        return f"{name}: {what} ∝ {along}^{found:z.2f}, expected {along}^{wanted:z.3g}: {why}"


def _quiet_rows(measured: Sequence[Measured], expected: Expected, rows: Sequence[Row]) -> list[Row]:
    """Tensors whose update cannot be read. Where that is because softmax does not care for a bias, say, their lr is
    read off the optimizer; the rest is not known, or wrong."""
    found = []
    judged = {row.name for row in rows if row.quantity == "update"}
    reasons: dict[str, set[str]] = {}
    for m in measured:
        for name, why in m.quiet.items():
            reasons.setdefault(name, set()).add(why)
    for name, why in sorted(reasons.items()):
        if name in judged or (
            expected.depth and not name.startswith(expected.blocks) and name not in measured[0].groups
        ):
            continue
        if not expected.depth and name not in expected.tensors:
            continue
        groups = [m.groups.get(name) for m in measured]
        if None in groups:
            message = f"{name}: is never updated: in no optimizer group?"
            found.append(Row(name, "update", None, None, None, "FAIL", expected.source, message))
        elif why <= {"noise", "late"}:
            found.append(_by_group(name, measured, expected))
        elif "eps" in why:
            eps = max(g.eps or 0.0 for g in groups)
            message = f"{name}: its eps of {eps:g} is larger than all of its gradient, so that lr is not its step"
            found.append(Row(name, "update", None, None, None, "FAIL", expected.source, message))
        else:
            eps = (
                f"its gradient is too near its eps of {max(g.eps or 0.0 for g in groups):g}, so that lr is not its step"
            )
            said = "never got a gradient: is it used?" if "no gradient" in why else eps
            found.append(Row(name, "update", None, None, None, "INCONCLUSIVE", expected.source, f"{name}: {said}"))
    return found


def _by_group(name: str, measured: Sequence[Measured], expected: Expected) -> Row:
    """A row from the lr of a tensor's optimizer group, which is exact."""
    if expected.depth:
        return Row(name, "update", None, None, None, "PASS", expected.source, f"{name}: its gradient is rounding noise")
    values = {(m.size, m.seed): m.groups[name].lr for m in measured}
    logs = expected.tensor(name, "update")
    slope, power = fit_slope(_beside(values, expected, logs)), expected.power(logs)
    right = slope is not None and abs(slope.value) < INIT_AND_UPDATE
    found = power if slope is None else slope.value + power
    first = (
        "its first step is not one of lr yet"
        if measured[0].quiet.get(name) == "late"
        else "its gradient is rounding noise"
    )
    message = f"{name}: {first}; its LR, by its optimizer group, is ∝ width^{found:z.2f}"
    return Row(name, "update", found, (found, found), power, "PASS" if right else "FAIL", expected.source, message)


def _regime(rows: list[Row], points, expected: Expected) -> list[Row]:
    """Where only effects are off and the lr is far too high or low, that is why: nothing has been judged then."""
    if not expected.tensors:
        return rows
    ratios = []
    first = expected.sizes[0]
    for name, tensor in expected.tensors.items():
        if tensor.role in ("hidden", "embedding"):
            init, update = (points.get((name, q, 0), {}) for q in ("init", "update"))
            ratios += [update[k] / init[k] for k in init.keys() & update.keys() if k[0] == first and init[k] > 0]
    ratio = statistics.median(ratios) if ratios else 0.1
    if LOW_LR < ratio < HIGH_LR:
        return rows
    if ratio >= HIGH_LR:
        if any(r.verdict == "FAIL" and r.quantity.split()[0] not in EFFECTS for r in rows):
            return rows
        why = f"updates dominate init (they are {ratio:.2g} of it at size {first}): lower --lr"
    else:
        why = f"updates vanish beside init (they are {ratio:.1g} of it at size {first}): raise --lr"
    spared = ("init", "multiplier")
    return [
        row
        if row.verdict == "PASS" or row.quantity in spared
        else replace(row, verdict="INCONCLUSIVE", message=f"{row.message.rpartition(': ')[0]}: {why}")
        for row in rows
    ]


_DEPTH = {
    "init": "its init sigma depends on depth, and so counts it twice where branches have x m_L^-alpha",
    "update": "its LR is not multiplied by m_L^(alpha-1)",
}


def _without_slope(name: str, label: str, values: dict, expected: Expected) -> Row | None:
    """Zeros and infinities: constant zero is an initial value like any other; the rest is wrong."""
    source, along = expected.source, "depth" if expected.depth else "width"
    if all(v == 0 for v in values.values()):
        if label != "update":
            return None
        return Row(name, label, None, None, None, "FAIL", source, f"{name}: is never updated: in no optimizer group?")
    if any(not math.isfinite(v) for v in values.values()):
        return Row(name, label, None, None, None, "FAIL", source, f"{name}: {label} is not finite at some {along}")
    if label == "init":
        return Row(name, label, None, None, None, "FAIL", source, f"{name}: init is zero at some {along}s only")
    return None
