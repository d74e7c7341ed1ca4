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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from crystal.mup.measure import OUTPUT, Measured, Task, clean, measure
from crystal.mup.plan import Layouts, infshapes_of, layouts_of, role_of
from crystal.mup.rules import PARAMETRIZATIONS, Role
from crystal.mup.slopes import decide, fit_slope
from crystal.mup.tolerances import ACTIVATION, FINITE_WIDTH, INIT_AND_UPDATE, OUTPUT_OR_DEPTH, PUSH
from crystal.mup.verdict import CheckError, Report, Row, explain, overall

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
) -> CoordCheck:
    """Train the task's models at all sizes and judge them by the rules of a parametrization.

    sizes: at least three widths (or depths), each a multiple of the first or not. seeds: how many; None: from
    MIN_SEEDS on, as many as the verdict needs, MAX_SEEDS at most. steps: forward passes, with steps - 1 updates.
    parametrization: whose rules are expected; `sp` expects mup's, since sp promises nothing. layouts: see `audit`.
    depth_alpha, blocks: for a check over depth (CompleteP). progress: is called with (size, seed) before each run.
    Raises CheckError for sizes, steps or optimizers that cannot be judged.
    """
    sizes = tuple(sorted(set(sizes)))
    if len(sizes) < 3 or steps < 2:
        raise CheckError(f"expected at least 3 {along}s and 2 steps, got {list(sizes)} and {steps}")
    if along == "depth" and parametrization == "sp":
        parametrization = "completep"
    began = time.perf_counter()
    shown: dict[int, nn.Module] = {}
    measured: list[Measured] = []
    rows: list[Row] = []
    expected: _Expected | None = None
    for count in range(1, (seeds or MAX_SEEDS) + 1):
        seed = first_seed + count - 1
        for size in sizes:
            if progress:
                progress(size, seed)
            keep = (lambda model, size=size: shown.__setitem__(size, model)) if count == 1 else None
            measured.append(measure(task, size, seed, steps, keep))
        if expected is None:
            expected = _Expected(shown, sizes, parametrization, along, depth_alpha, blocks, layouts)
            shown.clear()
        if count >= (seeds or MIN_SEEDS):
            rows = judge(measured, steps, expected)
            if seeds is None and overall(r.verdict for r in rows) != "INCONCLUSIVE":
                break
    notes = [
        f"{name}: its gradient never rose above rounding noise, so its update says nothing"
        for name in sorted(frozenset.intersection(*(m.quiet for m in measured)))
    ]
    return CoordCheck(rows, time.perf_counter() - began, notes, along, sizes, steps, label, measured, blocks)


class _Expected:
    """Which exponent the rules give every tensor and activation."""

    def __init__(self, models, sizes, parametrization, along, alpha, blocks, layouts):
        self.along, self.alpha, self.blocks = along, alpha, blocks
        self.rules = PARAMETRIZATIONS["mup" if parametrization == "sp" else parametrization]
        self.source = self.rules.source
        first, second, last = (models[s] for s in (sizes[0], sizes[1], sizes[-1]))
        dims = {clean(k): v for k, v in layouts_of(first, layouts).items()}
        self.roles: dict[str, Role] = {}
        if along == "width":
            shapes = {clean(k): v for k, v in infshapes_of(last, first, second).items()}
            self.roles = {name: role_of(name, shape, dims[name]) for name, shape in shapes.items()}

    def tensor(self, name: str, quantity: str) -> float:
        """Exponent of a tensor's init or update."""
        if self.along == "depth":
            inside = quantity == "update" and name.startswith(self.blocks)
            return self.alpha - 1 if inside else 0.0
        powers = self.rules.powers[self.roles[name]]
        return powers.init if quantity == "init" else powers.lr

    def activation(self, name: str, quantity: str, step: int) -> tuple[float, float]:
        """Range of right exponents of an activation (or of a push)."""
        if quantity == "size" and step == 1 and self.along == "width":
            # Table 8's output is a sum of fan_in independent terms divided by fan_in, until updates correlate them
            return (-0.5, 0.0) if name == OUTPUT else (0.0, 0.0)
        return (OUTPUT_OR_DEPTH if name == OUTPUT or self.along == "depth" else FINITE_WIDTH, 0.0)

    def judges(self, name: str, quantity: str) -> bool:
        """Not a readout's raw output, whose forward multiplier comes after it; over depth, of activations only the
        end of the residual stream: one block of L adds L^-alpha, and what it says before its multiplier has no rule."""
        if quantity in ("init", "update"):
            # a 1/sqrt(2L) in the init is a depth rule of its own, where branches have no multiplier
            return name in self.roles or (self.along == "depth" and (quantity == "update" or self.rules.depth))
        if self.along == "depth":
            return quantity != "push" and name in (OUTPUT, f"{self.blocks}last")
        return self.roles.get(name if quantity == "push" else f"{name}.weight") != "output"


def judge(measured: Sequence[Measured], steps: int, expected: _Expected) -> list[Row]:
    """A row for every tensor and activation: exponent, interval, verdict."""
    points: dict[tuple[str, str, int], dict[tuple[int, int], float]] = {}
    for m in measured:
        for (name, quantity, step), value in m.values.items():
            if quantity in ("update", "push"):
                step = 0  # the first, whenever it came
            elif quantity in ("size", "change") and step not in (1, steps):
                continue
            if expected.along == "depth":
                name = by_depth(name, m.size, expected.blocks)
            points.setdefault((name, quantity, step), {})[m.size, m.seed] = value
    groups = measured[0].groups
    rows = [_row(key, values, len(measured), expected, groups) for key, values in points.items()]
    order = {"init": 0, "update": 1, "push": 2, "size": 3, "change": 4}
    return sorted((r for r in rows if r is not None), key=lambda r: order[r.quantity.split()[0]])


def by_depth(name: str, depth: int, blocks: str) -> str:
    """A name that means the same at every depth: the last block's own number is left out."""
    return re.sub(rf"^{re.escape(blocks)}{depth - 1}(?=\.|$)", f"{blocks}last", name)


def _row(key, values: dict, runs: int, expected: _Expected, groups: dict[str, int]) -> Row | None:
    name, quantity, step = key
    if len(values) < runs or not expected.judges(name, quantity):  # or not there at every size
        return None
    label = quantity if step == 0 else f"{quantity} t={step}"
    slope = fit_slope(values)
    if slope is None:
        return _without_slope(name, label, values, expected)
    if quantity in ("init", "update"):
        low = high = expected.tensor(_inner(name, expected.blocks), quantity)
        tolerance = INIT_AND_UPDATE
    else:
        low, high = expected.activation(name, quantity, step)
        tolerance = PUSH if quantity == "push" else ACTIVATION
    verdict = decide(slope, low, high, tolerance)
    message = ""
    if verdict != "PASS":
        why = explain(quantity, expected.roles.get(name), slope.value, high, groups.get(name))
        if expected.along == "depth":
            why = _DEPTH.get(quantity, "the residual stream grows with depth: branches want x m_L^-alpha")
            why = why if quantity in _DEPTH or slope.value > 0 else "the residual stream dies out with depth"
        wanted = f"{expected.along}^{high:g}"
        why = why if verdict == "FAIL" else "more seeds or widths would tell"
        what = {"init": "init", "update": "first update", "push": "effect of the first update"}.get(quantity, label)
        message = f"{name}: {what} ∝ {expected.along}^{slope.value:z.2f}, expected {wanted}: {why}"
    return Row(name, label, slope.value, (slope.low, slope.high), high, verdict, expected.source, message)


_DEPTH = {
    "init": "its init sigma depends on depth, and so counts it twice where branches have x m_L^-alpha",
    "update": "its LR is not multiplied by m_L^(alpha-1)",
}


def _inner(name: str, blocks: str) -> str:
    return name.replace(f"{blocks}last", f"{blocks}0")


def _without_slope(name: str, label: str, values: dict, expected: _Expected) -> Row | None:
    """Zeros and infinities: constant zero is an initial value like any other; the rest is wrong."""
    source = expected.source
    if all(v == 0 for v in values.values()):
        if label != "update":
            return None
        return Row(name, label, None, None, None, "FAIL", source, f"{name}: is never updated: in no optimizer group?")
    if any(not math.isfinite(v) for v in values.values()):
        return Row(
            name, label, None, None, None, "FAIL", source, f"{name}: {label} is not finite at some {expected.along}"
        )
    if label == "init":
        return Row(
            name, label, None, None, None, "FAIL", source, f"{name}: init is zero at some {expected.along}s only"
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
