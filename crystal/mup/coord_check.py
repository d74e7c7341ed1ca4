"""The coordinate check with a verdict: are activations and updates as large at every width as muP says?

A picture of activation sizes leaves the judgement to the eye, and the eye is wrong: a hidden LR that is divided
twice or an embedding LR that is divided at all does not show, and two wrong rules look better than the right one
(facts and figures in docs/mup.md). So every tensor is judged by three exponents of its own, and every activation by
its size and its change since initialisation, each with a confidence interval and the exponent that the rule gives:

| quantity | of | expected exponent of width |
|---|---|---|
| init     | tensor | the rule's: -1/2 hidden, 0 others |
| update   | tensor, its first | the rule's lr: -1 hidden, 0 others |
| push     | tensor, what the update does to its output | 0 |
| size     | activation, first and last step | 0; the model's output may start at -1/2 |
| change   | activation, since the first step | 0 |

After updates, finite widths lie below 0: an update is the sum of a coherent part, of constant effect, and an
incoherent one whose effect falls as width^-1/2. On correct models at widths 64 to 512 that comes to -0.4 at most.

Seeds are added one at a time until every interval lies inside or outside what is right, so most checks end after two.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from crystal.mup.constraints import parametrization_named
from crystal.mup.expected import Expected, Shown, Tensors, expectations, free_tensors, show, wrong_multipliers
from crystal.mup.measure import Measured, Task, measure
from crystal.mup.optimizers import Group
from crystal.mup.plan import Layouts, PlanError
from crystal.mup.slopes import decide, fit_slope
from crystal.mup.tolerances import ACTIVATION, FEW, FEW_ELEMENTS, HIGH_LR, INIT_AND_UPDATE, LOW_LR, PUSH, SGD_UPDATE
from crystal.mup.verdict import EFFECTS, CheckError, Report, Row, explain, overall

Along = Literal["width", "depth"]
MIN_SEEDS, MAX_SEEDS = 2, 5


@dataclass
class CoordCheck(Report):
    """A report that keeps its measurements, for plots. along: width or depth; sizes: those measured; blocks: start of
    the names of what is inside residual blocks; settings: what else the caller says of how it was made, for captions.
    """

    along: Along = "width"
    sizes: tuple[int, ...] = ()
    steps: int = 0
    label: str = ""
    measured: list[Measured] = field(default_factory=list)
    blocks: str = "blocks."
    settings: dict[str, float | int | str] = field(default_factory=dict)


def coord_check(
    task: Task,
    sizes: Sequence[int],
    *,
    seeds: int | None = None,
    steps: int = 4,
    parametrization: str = "mup",
    along: Along = "width",
    depth_alpha: float = 1.0,
    blocks: str = "blocks.",
    layouts: Layouts | None = None,
    first_seed: int = 1,
    label: str = "",
    progress: Callable[[int, int], None] | None = None,
    accept: Sequence[str] = (),
) -> CoordCheck:
    """Train the task's models at all sizes and judge them by the rules of a parametrization.

    sizes: at least three widths (or depths), each a multiple of the first or not. seeds: how many; None: from
    MIN_SEEDS on, as many as the verdict needs, MAX_SEEDS at most. steps: forward passes, with steps - 1 updates.
    parametrization: whose rules are expected; `sp` expects mup's, since sp promises nothing. layouts: see `audit`.
    depth_alpha, blocks: for a check over depth (CompleteP). progress: is called with (size, seed) before each run.
    accept: names (or patterns) of rows that may be INCONCLUSIVE.
    Raises CheckError for sizes, steps, models or optimizers that cannot be judged.
    """
    parametrization_named(parametrization)
    sizes = tuple(sorted(set(sizes)))
    if len(sizes) < 3 or steps < 2:
        raise CheckError(f"expected at least 3 {along}s and 2 steps, got {list(sizes)} and {steps}")
    if along == "depth" and parametrization == "sp":
        parametrization = "completep"
    began = time.perf_counter()
    shown: dict[int, Shown] = {}
    measured: list[Measured] = []
    rows: list[Row] = []
    expected: Expected | None = None
    for count in range(1, (seeds or MAX_SEEDS) + 1):
        seed = first_seed + count - 1
        for size in sizes:
            if progress:
                progress(size, seed)
            keep = (lambda *seen, size=size: shown.__setitem__(size, show(*seen))) if count == 1 else None
            measured.append(measure(task, size, seed, steps, keep))
        if expected is None:
            try:
                expected = expectations(shown, sizes, parametrization, along, depth_alpha, blocks, layouts,
                                        measured[0].groups)  # fmt: skip
            except PlanError as error:
                raise CheckError(str(error)) from None
            shown.clear()
        if count >= (seeds or MIN_SEEDS):
            rows = judge(measured, steps, expected)
            if seeds is None and overall(r.verdict for r in rows) != "INCONCLUSIVE":
                break
    notes = [
        f"{name}: its gradient never rose above rounding noise, so its update says nothing"
        for name in sorted(frozenset.intersection(*(frozenset(m.quiet) for m in measured)))
        if measured[0].quiet[name] == "noise"
    ]
    return CoordCheck(
        rows, time.perf_counter() - began, notes, along, sizes, steps, label, measured, blocks, accept=tuple(accept)
    )


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
                return 0.0, 0.0, SGD_UPDATE
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
        if quantity in ("init", "update") and tensor is not None and not expected.depth:
            if role is None:
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
        if name in judged or (expected.depth and not name.startswith(expected.blocks) and name not in measured[0].groups):
            continue
        if not expected.depth and name not in expected.tensors:
            continue
        groups = [m.groups.get(name) for m in measured]
        if None in groups:
            message = f"{name}: is never updated: in no optimizer group?"
            found.append(Row(name, "update", None, None, None, "FAIL", expected.source, message))
        elif why == {"noise"}:
            found.append(_by_group(name, measured, expected))
        elif "eps" in why:
            eps = max(g.eps or 0.0 for g in groups)
            message = f"{name}: its eps of {eps:g} is larger than all of its gradient, so that lr is not its step"
            found.append(Row(name, "update", None, None, None, "FAIL", expected.source, message))
        else:
            eps = f"its gradient is too near its eps of {max(g.eps or 0.0 for g in groups):g} to tell whether lr is its step"
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
    message = f"{name}: its gradient is rounding noise; its LR, by its optimizer group, is ∝ width^{found:z.2f}"
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
        return Row(
            name, label, None, None, None, "FAIL", source, f"{name}: {label} is not finite at some {along}"
        )
    if label == "init":
        return Row(
            name, label, None, None, None, "FAIL", source, f"{name}: init is zero at some {along}s only"
        )
    return None


def assert_coordinate_check(
    factory: Callable[[int], nn.Module],
    *,
    optimizer: Callable,
    loss: Callable,
    batch: Callable,
    widths: Sequence[int] = (64, 128, 256),
    parametrization: str = "mup",
    steps: int = 4,
    seeds: int | None = None,
    layouts: Layouts | None = None,
) -> CoordCheck:
    """For a test suite: raises AssertionError, naming tensors and rules, unless the check passes.

    factory: width → initialised module (torch's global seed is set before each call); optimizer: module → its
    optimizer; loss: (module, batch) → scalar; batch: seed → a batch. The rest as in `coord_check`.
    """
    import torch

    from crystal.mup.verdict import summary

    def model(width: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return factory(width)

    check = coord_check(
        Task(model, optimizer, loss, batch),
        widths,
        parametrization=parametrization,
        steps=steps,
        seeds=seeds,
        layouts=layouts,
    )
    bad = [row for row in check.rows if row.verdict != "PASS"]
    if check.verdict != "PASS":
        raise AssertionError("\n".join([f"coordinate check: {check.verdict}", *summary(check.failures or bad)]))
    return check
