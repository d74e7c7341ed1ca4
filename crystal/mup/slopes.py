"""Exponents from measured sizes, with an interval, and the decision between right, wrong and not known yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from crystal.mup.verdict import Verdict


@dataclass(frozen=True)
class Slope:
    """value: d log(y) / d log(size); low, high: its 95% confidence interval."""

    value: float
    low: float
    high: float


def fit_slope(points: Mapping[tuple[int, int], float]) -> Slope | None:
    """Least squares of log y on log size over (size, seed) → y > 0, with an intercept of its own for each seed.

    A seed has the same data at every size, so seeds are blocks. The interval is Student's, from the residuals; these
    hold the curvature of small sizes too, which is as much a reason to doubt a slope as noise is. None with fewer
    than three points more than there are seeds, or when a value is not positive.
    """
    seeds = sorted({seed for _, seed in points})
    free = len(points) - len(seeds) - 1
    if free < 1 or not all(0 < y < math.inf for y in points.values()):
        return None
    x = np.array([math.log(size) for size, _ in points])
    y = np.array([math.log(v) for v in points.values()])
    block = np.array([seeds.index(seed) for _, seed in points])
    for b in range(len(seeds)):
        mine = block == b
        x[mine] -= x[mine].mean()
        y[mine] -= y[mine].mean()
    spread = float(x @ x)
    if spread == 0:
        return None
    slope = float(x @ y) / spread
    residual = y - slope * x
    half = student(free) * math.sqrt(float(residual @ residual) / free / spread)
    return Slope(slope, slope - half, slope + half)


def decide(slope: Slope, low: float, high: float, tolerance: float) -> Verdict:
    """PASS when the whole interval is within tolerance of [low, high], FAIL when none of it is.

    (The first is an equivalence test: not seeing a difference is not enough, it must be excluded.)
    """
    if slope.low >= low - tolerance and slope.high <= high + tolerance:
        return "PASS"
    if slope.high < low - tolerance or slope.low > high + tolerance:
        return "FAIL"
    return "INCONCLUSIVE"


def student(free: int) -> float:
    """Two-sided 95% point of Student's t with `free` degrees of freedom (Abramowitz & Stegun 26.7.5 beyond 4)."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    if free in exact:
        return exact[free]
    z = 1.959964
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / free + g2 / free**2 + g3 / free**3
