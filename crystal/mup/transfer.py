"""Do tuned hyperparameters transfer? From losses over widths and learning rates to a verdict.

Per width, loss against log2(lr) is a parabola near its minimum; its vertex is the optimum, known to a fraction of
the grid's step, with an interval from resampling. Transfer means that the optimum stays where it is as width grows,
and that using the narrowest width's optimum at the widest one costs next to nothing. Where the data cannot tell (the
optimum lies at the grid's edge, or moves by less than its own interval and the grid's step), it is said so.

Three metrics after Kalra & Barkeshli 2026 ("Quantifying Hyperparameter Transfer", arXiv 2605.21486): how well the
optimum follows a law in width (fit quality), how much loss an octave of error in lr costs at the widest width
(robustness to extrapolation error), and how far the loss that the parametrization tends to lies above another's
(asymptotic loss penalty). The paper's constants are not reproduced; the definitions used are in the docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
MAX_SHIFT, MAX_REGRET = 0.5, 0.01  # octaves; share of the loss
RESAMPLES, SEED = 500, 0
WINDOW = 1.0  # octaves either side of the best point that the parabola is fitted on, or two steps of a coarser grid


@dataclass(frozen=True)
class Trial:
    """One training run. lr: base learning rate; loss: held-out nats; diverged: not finite, or above its start."""

    width: int
    seed: int
    lr: float
    loss: float
    diverged: bool = False


@dataclass(frozen=True)
class Optimum:
    """A width's best learning rate.

    log2_lr_optimum: the vertex, or the best grid point where there is none; ci: 95%; loss: at the vertex;
    curvature: nats per octave squared; r2: of the parabola; edge: why the grid does not enclose the optimum, or "".
    """

    width: int
    log2_lr_optimum: float
    ci: tuple[float, float]
    loss: float
    curvature: float
    r2: float
    edge: str


@dataclass(frozen=True)
class Transfer:
    """The verdict of one parametrization.

    shift_octaves: the optimum's move that is largest among all widths, against the narrowest; shift_ci: 95%;
    regret: (loss at the widest width with the narrowest's optimum - loss with its own) / the latter.
    """

    verdict: Verdict
    message: str
    widths: dict[int, Optimum]
    shift_octaves: float
    shift_ci: tuple[float, float]
    regret: float
    trials: int
    diverged: int
    metrics: dict[str, float]

    def as_dict(self) -> dict:
        return asdict(self)


def curves(trials: Sequence[Trial]) -> dict[int, dict[float, dict[int, float]]]:
    """width → log2 lr → seed → loss, diverged runs left out."""
    found: dict[int, dict[float, dict[int, float]]] = {}
    for t in sorted(trials, key=lambda t: (t.width, t.lr, t.seed)):
        points = found.setdefault(t.width, {}).setdefault(round(math.log2(t.lr), 6), {})
        if not t.diverged and math.isfinite(t.loss):
            points[t.seed] = t.loss
    return found


def fit_optimum(width: int, curve: dict[float, dict[int, float]]) -> Optimum:
    """The optimum of one width, with its interval. Raises ValueError when every run diverged."""
    mean = _means(curve)
    if not mean:
        raise ValueError(f"width {width}: expected a run that did not diverge")
    best = min(mean, key=mean.get)
    tried = sorted(curve)
    edge = ""
    if best in (tried[0], tried[-1]):
        edge = f"the best of {len(tried)} learning rates is the {'smallest' if best == tried[0] else 'largest'}"
    elif not any(x > best for x in mean):
        edge = "everything above the best learning rate diverged"
    seeds = sorted({s for points in curve.values() for s in points})
    vertex, loss, curvature, r2 = _parabola(mean, best)
    generator = np.random.default_rng(SEED)
    vertices = []
    for _ in range(RESAMPLES):
        drawn = generator.choice(seeds, len(seeds))
        again = {
            x: float(np.mean([ys[s] for s in drawn if s in ys])) for x, ys in curve.items() if set(ys) & set(drawn)
        }
        if again:
            vertices.append(_parabola(again, min(again, key=again.get))[0])
    low, high = np.percentile(vertices, [2.5, 97.5])
    step = min(np.diff(tried)) if len(tried) > 1 else 0.0
    # resampling three seeds cannot show less spread than a fit through grid points has
    half = max((high - low) / 2, 0.1 * step)
    middle = (low + high) / 2
    return Optimum(width, vertex, (float(middle - half), float(middle + half)), loss, curvature, r2, edge)


def _means(curve: dict[float, dict[int, float]]) -> dict[float, float]:
    """Mean over seeds of every learning rate at which no seed diverged (or, failing that, of what there is)."""
    most = max((len(ys) for ys in curve.values()), default=0)
    return {x: float(np.mean(list(ys.values()))) for x, ys in curve.items() if ys and len(ys) == most}


def _parabola(mean: dict[float, float], best: float) -> tuple[float, float, float, float]:
    """(vertex, loss there, curvature, r2) of a parabola through the points around the best one."""
    if len(mean) < 3:
        return best, mean[best], 0.0, 0.0
    # a valley is steep on one side, so points further off would pull the vertex to the other
    reach = max(WINDOW, 2 * float(np.median(np.diff(sorted(mean)))))
    near = {x: y for x, y in mean.items() if abs(x - best) <= reach + 1e-6}
    if len(near) < 3:
        return best, mean[best], 0.0, 0.0
    x, y = np.array(list(near)), np.array(list(near.values()))
    # points that are much worse than the best say little of the minimum's place
    weights = 1 / (1 + (y - y.min()) / max(np.median(y) - y.min(), 1e-9))
    a, b, c = np.polyfit(x - best, y, 2, w=weights)
    if a <= 0:
        return best, mean[best], 0.0, 0.0
    offset = float(np.clip(-b / (2 * a), x.min() - best, x.max() - best))
    fitted = np.polyval((a, b, c), x - best)
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float(((y - fitted) ** 2).sum()) / spread if spread else 0.0
    return best + offset, float(np.polyval((a, b, c), offset)), float(a), r2


def judge(trials: Sequence[Trial], max_shift: float = MAX_SHIFT, max_regret: float = MAX_REGRET) -> Transfer:
    """The transfer verdict over all widths of one parametrization. Raises ValueError with fewer than two widths."""
    by_width = curves(trials)
    if len(by_width) < 2:
        raise ValueError(f"expected at least two widths, got {sorted(by_width)}")
    optima = {w: fit_optimum(w, curve) for w, curve in by_width.items()}
    narrow, wide = min(optima), max(optima)
    base = optima[narrow]
    moved = max(
        (o for o in optima.values() if o.width != narrow), key=lambda o: abs(o.log2_lr_optimum - base.log2_lr_optimum)
    )
    shift = moved.log2_lr_optimum - base.log2_lr_optimum
    half = math.hypot(*((o.ci[1] - o.ci[0]) / 2 for o in (moved, base)))
    tried = sorted(by_width[narrow])
    step = min(np.diff(tried)) if len(tried) > 1 else math.inf
    regret = _regret(by_width[wide], optima[wide], base.log2_lr_optimum)
    edges = [f"width {o.width}: {o.edge}" for o in optima.values() if o.edge]
    if edges:
        verdict, message = "INCONCLUSIVE", f"on the grid's edge, so the optimum is not enclosed: {'; '.join(edges)}"
    elif abs(shift) <= max_shift and regret < max_regret:
        verdict = "PASS"
        message = f"the optimum moves by {shift:+.2f} octaves from width {narrow} to {moved.width}; regret {regret:.2%}"
    elif regret < max_regret and (abs(shift) <= step or abs(shift) - half <= max_shift):
        verdict = "INCONCLUSIVE"
        message = (
            f"within resolution: the optimum moves by {shift:+.2f} ± {half:.2f} octaves on a grid of {step:g}, "
            f"with a regret of {regret:.2%}; more seeds or a finer grid would tell"
        )
    else:
        verdict = "FAIL"
        message = (
            f"the optimum moves by {shift:+.2f} ± {half:.2f} octaves from width {narrow} to {moved.width} "
            f"(at most {max_shift:g}); with the narrowest's, width {wide} loses {regret:.2%} (at most {max_regret:.0%})"
        )
    diverged = sum(t.diverged or not math.isfinite(t.loss) for t in trials)
    return Transfer(
        verdict, message, optima, shift, (shift - half, shift + half), regret, len(trials), diverged, metrics(optima)
    )


def _regret(curve: dict[float, dict[int, float]], optimum: Optimum, at: float) -> float:
    """Share of loss lost at a width by using another width's optimum, read between the measured points."""
    mean = _means(curve)
    x = sorted(mean)
    used = float(np.interp(at, x, [mean[k] for k in x]))
    own = min(float(np.interp(optimum.log2_lr_optimum, x, [mean[k] for k in x])), *mean.values())
    return max(0.0, (used - own) / own)


def metrics(optima: dict[int, Optimum]) -> dict[str, float]:
    """After arXiv 2605.21486.

    drift_octaves_per_doubling and fit_residual_octaves: least squares of the optimum on log2 width (fit quality);
    nats_per_octave_of_error: the parabola's rise one octave beside the optimum at the widest width (robustness);
    asymptotic_loss: what loss(width) = a + b / width tends to; its difference between two parametrizations is the
    asymptotic loss penalty.
    """
    widths = np.array(sorted(optima), dtype=float)
    vertices = np.array([optima[int(w)].log2_lr_optimum for w in widths])
    losses = np.array([optima[int(w)].loss for w in widths])
    drift, at_zero = np.polyfit(np.log2(widths), vertices, 1)
    residual = vertices - np.polyval((drift, at_zero), np.log2(widths))
    _, limit = np.polyfit(1 / widths, losses, 1)
    return {
        "drift_octaves_per_doubling": float(drift),
        "fit_residual_octaves": float(np.sqrt((residual**2).mean())),
        "nats_per_octave_of_error": optima[int(widths[-1])].curvature,
        "asymptotic_loss": float(limit),
    }


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
    from crystal.mup.slopes import student

    x = np.log([w for w, _ in points])
    y = np.log(list(points.values()))
    slope, height = np.polyfit(x, y, 1)
    free = max(len(x) - 2, 1)
    error = math.sqrt(float(((y - slope * x - height) ** 2).sum()) / free)
    spread = float(((x - x.mean()) ** 2).sum())
    return slope, height, student(free) * error * math.sqrt(1 + 1 / len(x) + (math.log(at) - x.mean()) ** 2 / spread)
