"""How low the loss of wider models will be: a power law in width, and how it did on the widest measured one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crystal.mup.slopes import student
from crystal.mup.transfer import Trial


@dataclass(frozen=True)
class Forecast:
    """Loss of wider models from a line log(loss) = a + b log(width), and how that did on the widest measured one."""

    exponent: float
    coefficient: float
    held_out_width: int
    held_out_predicted: float
    held_out_interval: tuple[float, float]
    held_out_measured: float

    def at(self, width: int) -> float:
        return self.coefficient * width**self.exponent


def forecast(trials: Sequence[Trial]) -> Forecast:
    """Fit the best loss per seed of all but the widest width, predict that, and fit again on all.

    The interval is Student's prediction interval of the line, each (width, seed) a point. Raises ValueError with
    fewer than three widths.
    """
    best: dict[tuple[int, int], float] = {}
    for t in trials:
        if not t.diverged and math.isfinite(t.loss):
            key = (t.width, t.seed)
            best[key] = min(best.get(key, math.inf), t.loss)
    widths = sorted({w for w, _ in best})
    if len(widths) < 3:
        raise ValueError(f"expected at least three widths, got {widths}")
    held = widths[-1]
    known = {k: v for k, v in best.items() if k[0] != held}
    slope, height, half = _line(known, held)
    predicted = math.exp(height + slope * math.log(held))
    measured = float(np.mean([v for (w, _), v in best.items() if w == held]))
    whole_slope, whole_height, _ = _line(best, held)
    interval = (predicted * math.exp(-half), predicted * math.exp(half))
    return Forecast(whole_slope, math.exp(whole_height), held, predicted, interval, measured)


def _line(points: dict[tuple[int, int], float], at: int) -> tuple[float, float, float]:
    """(slope, height, half width of the 95% prediction interval in log loss at a width)."""
    x = np.log([w for w, _ in points])
    y = np.log(list(points.values()))
    slope, height = np.polyfit(x, y, 1)
    free = max(len(x) - 2, 1)
    error = math.sqrt(float(((y - slope * x - height) ** 2).sum()) / free)
    spread = float(((x - x.mean()) ** 2).sum())
    return slope, height, student(free) * error * math.sqrt(1 + 1 / len(x) + (math.log(at) - x.mean()) ** 2 / spread)
