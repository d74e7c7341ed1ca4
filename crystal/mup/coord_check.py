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

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from crystal.mup.constraints import parametrization_named
from crystal.mup.coord_rows import judge
from crystal.mup.expected import Expected, Shown, expectations, show
from crystal.mup.measure import Measured, Task, measure
from crystal.mup.plan import Layouts, PlanError
from crystal.mup.verdict import CheckError, Report, Row, overall

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
    if not all(isinstance(size, int) and size > 0 for size in sizes) or not isinstance(steps, int):
        raise CheckError(f"expected {along}s and steps to be positive whole numbers, got {list(sizes)} and {steps!r}")
    if along not in ("width", "depth") or (seeds is not None and seeds < 1):
        raise CheckError(f"expected along to be width or depth and seeds at least 1, got {along!r} and {seeds}")
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
    if expected.unlike:
        notes.append(f"its forward pass was not followed ({expected.unlike}): multipliers are taken to be Table 8's")
    return CoordCheck(
        rows, time.perf_counter() - began, notes, along, sizes, steps, label, measured, blocks, accept=tuple(accept)
    )


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
    accept: Sequence[str] = (),
) -> CoordCheck:
    """For a test suite: raises AssertionError, naming tensors and rules, unless the check passes.

    factory: width → initialised module (torch's global seed is set before each call); optimizer: module → its
    optimizer; loss: (module, batch) → scalar; batch: seed → a batch. The rest as in `coord_check`.
    """

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
        accept=accept,
    )
    if check.verdict != "PASS":
        raise AssertionError(f"coordinate check: {check}")
    return check
