"""Do tuned hyperparameters transfer? From losses over widths and learning rates to a verdict.

Per width, loss against log2(lr) is a parabola near its minimum; its vertex is the optimum, known to a fraction of
the grid's step, with an interval from resampling. Transfer means that the optimum stays where it is as width grows,
and that using the narrowest width's optimum at the widest one costs next to nothing.

A valley is not a parabola far from its minimum, so the vertex depends on how many points around the best one are
fitted. Which window is right cannot be told from the losses without choosing the answer, so every verdict is made in
four windows, and counts only if they agree. Where the data cannot tell (the windows disagree, the optimum lies at the
grid's edge, or it moves by less than its own interval and the grid's step), the verdict is INCONCLUSIVE and says why.

Three metrics after Kalra & Barkeshli 2026 ("Quantifying Hyperparameter Transfer", arXiv 2605.21486): how well the
optimum follows a law in width (fit quality), how much loss an octave of error in lr costs at the widest width
(robustness to extrapolation error), and how far the loss that the parametrization tends to lies above another's
(asymptotic loss penalty). The paper's constants are not reproduced; the definitions used are in the docstrings.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import fmean
from typing import Literal

import numpy as np

from crystal.mup.tolerances import MAX_REGRET, MAX_SHIFT

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
RESAMPLES, SEED = 500, 0
WINDOWS = (0.5, 1.0, 1.5, 2.0)  # octaves either side of the best point that the parabola is fitted on
WINDOW = 1.0  # the one whose numbers are reported; on a coarser grid the one that reaches two steps


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
    window: first and last log2 lr that were fitted; parabola: its coefficients (a, b, c), for a loss of
    a x^2 + b x + c at x = log2 lr, or None where fewer than three points or a hill leave none.
    """

    width: int
    log2_lr_optimum: float
    ci: tuple[float, float]
    loss: float
    curvature: float
    r2: float
    edge: str
    window: tuple[float, float]
    parabola: tuple[float, float, float] | None


@dataclass(frozen=True)
class Window:
    """What the points within some octaves of each width's best learning rate say.

    verdict and numbers as in Transfer; all None where a width has fewer than three points within the window, of
    which `message` says where.
    """

    verdict: Verdict | None
    message: str
    shift_octaves: float | None = None
    shift_ci: tuple[float, float] | None = None
    regret: float | None = None


@dataclass(frozen=True)
class Transfer:
    """The verdict of one parametrization.

    shift_octaves: the optimum's move that is largest among all widths, against the narrowest; shift_ci: 95%;
    regret: (loss at the widest width with the narrowest's optimum - loss with its own) / the latter.
    widths, shift and regret are those of the window `window_octaves`; windows has each window's, by octaves.
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
    window_octaves: float
    windows: dict[float, Window]

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


def fit_optimum(width: int, curve: dict[float, dict[int, float]], octaves: float = WINDOW) -> Optimum:
    """The optimum of one width from the points within `octaves` of the best one, with its interval.

    Raises ValueError when every run diverged.
    """
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
    near, fit = _near(mean, octaves), _parabola(mean, octaves)
    low, high = _interval(curve, octaves)
    step = float(min(np.diff(tried))) if len(tried) > 1 else 0.0
    # resampling three seeds cannot show less spread than a fit through grid points has
    half = max((high - low) / 2, 0.1 * step)
    middle = (low + high) / 2
    return Optimum(
        width, fit.vertex, (middle - half, middle + half), fit.loss, fit.curvature, fit.r2, edge,
        (min(near), max(near)), fit.coefficients,
    )  # fmt: skip


def _interval(curve: dict[float, dict[int, float]], octaves: float) -> tuple[float, float]:
    """The middle 95% of the vertices that resampled seeds give."""
    seeds = sorted({s for points in curve.values() for s in points})
    vertices = []
    for drawn, times in _resamples(len(seeds)).items():
        picked = [seeds[i] for i in drawn]
        again = {x: fmean(ys[s] for s in picked if s in ys) for x, ys in curve.items() if set(ys) & set(picked)}
        if again:
            vertices += [_parabola(again, octaves).vertex] * times
    low, high = np.percentile(vertices, [2.5, 97.5])
    return float(low), float(high)


@cache
def _resamples(count: int) -> Counter[tuple[int, ...]]:
    """Bootstrap samples of so many seeds, and how often each came: few seeds have few different samples."""
    generator = np.random.default_rng(SEED)
    return Counter(tuple(sorted(generator.choice(count, count).tolist())) for _ in range(RESAMPLES))


def _means(curve: dict[float, dict[int, float]]) -> dict[float, float]:
    """Mean over seeds of every learning rate at which no seed diverged (or, failing that, of what there is)."""
    most = max((len(ys) for ys in curve.values()), default=0)
    return {x: fmean(ys.values()) for x, ys in curve.items() if ys and len(ys) == most}


def _near(mean: dict[float, float], octaves: float) -> dict[float, float]:
    """The points within some octaves of the best one."""
    best = min(mean, key=mean.get)
    return {x: y for x, y in mean.items() if abs(x - best) <= octaves + 1e-6}


@dataclass(frozen=True)
class _Fit:
    """A parabola's vertex, the loss there, curvature, r2 and coefficients; or the best point, and no coefficients."""

    vertex: float
    loss: float
    curvature: float = 0.0
    r2: float = 0.0
    coefficients: tuple[float, float, float] | None = None


def _parabola(mean: dict[float, float], octaves: float) -> _Fit:
    """The parabola through the points within some octaves of the best one."""
    best, near = min(mean, key=mean.get), _near(mean, octaves)
    without = _Fit(best, mean[best])
    if len(near) < 3:
        return without
    x, y = np.array(list(near)), np.array(list(near.values()))
    # points that are much worse than the best say little of the minimum's place
    weights = 1 / (1 + (y - y.min()) / max(np.median(y) - y.min(), 1e-9))
    a, b, c = (float(k) for k in np.polyfit(x - best, y, 2, w=weights))
    if a <= 0:
        return without
    offset = float(np.clip(-b / (2 * a), x.min() - best, x.max() - best))
    fitted = np.polyval((a, b, c), x - best)
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float(((y - fitted) ** 2).sum()) / spread if spread else 0.0
    about_zero = (a, b - 2 * a * best, a * best**2 - b * best + c)
    return _Fit(best + offset, float(np.polyval((a, b, c), offset)), a, r2, about_zero)


def judge(trials: Sequence[Trial], max_shift: float = MAX_SHIFT, max_regret: float = MAX_REGRET) -> Transfer:
    """The transfer verdict over all widths of one parametrization, made in every window of WINDOWS.

    Raises ValueError with fewer than two widths.
    """
    by_width = curves(trials)
    if len(by_width) < 2:
        raise ValueError(f"expected at least two widths, got {sorted(by_width)}")
    found = {octaves: _within(by_width, octaves, max_shift, max_regret) for octaves in WINDOWS}
    windows = {octaves: window for octaves, (window, _) in found.items()}
    reported = _reported(by_width, windows)
    window, optima = windows[reported], found[reported][1]
    judged = {octaves: w for octaves, w in windows.items() if w.verdict}
    if not judged:
        verdict = "INCONCLUSIVE"
        message = f"the grid is too coarse to place the optimum: {window.message}"
    elif len({w.verdict for w in judged.values()}) > 1:
        verdict, message = "INCONCLUSIVE", f"the verdict depends on how many points are fitted: {_dissent(judged)}"
    else:
        verdict, message = window.verdict, window.message
        if not any(o.edge for o in optima.values()):
            message += f" (judged within {_octaves(judged)})"
    diverged = sum(t.diverged or not math.isfinite(t.loss) for t in trials)
    shift, shift_ci, regret, _ = _move(by_width, optima)
    return Transfer(
        verdict, message, optima, shift, shift_ci, regret, len(trials), diverged, metrics(optima), reported, windows
    )


def _reported(by_width: dict[int, dict[float, dict[int, float]]], windows: dict[float, Window]) -> float:
    """The window whose numbers stand for the sweep: WINDOW, or the first to reach two steps of the grid and have
    three points; chosen by the grid alone, never by what the windows say."""
    steps = [float(np.median(np.diff(sorted(curve)))) for curve in by_width.values() if len(curve) > 1]
    reach = max(WINDOW, 2 * max(steps, default=0.0))
    wide = [octaves for octaves in windows if octaves >= reach - 1e-6]
    return next((octaves for octaves in wide if windows[octaves].verdict), wide[0] if wide else max(windows))


def _within(
    by_width: dict[int, dict[float, dict[int, float]]], octaves: float, max_shift: float, max_regret: float
) -> tuple[Window, dict[int, Optimum]]:
    """(what one window says, the optima in it)."""
    optima = {w: fit_optimum(w, curve, octaves) for w, curve in by_width.items()}
    shift, shift_ci, regret, moved = _move(by_width, optima)
    edges = [f"width {o.width}: {o.edge}" for o in optima.values() if o.edge]
    if edges:
        message = f"on the grid's edge, so the optimum is not enclosed: {'; '.join(edges)}"
        return Window("INCONCLUSIVE", message, shift, shift_ci, regret), optima
    few = {w: len(near) for w, curve in by_width.items() if len(near := _near(_means(curve), octaves)) < 3}
    if few:
        width, count = next(iter(few.items()))
        points = f"{count} point{'s' * (count > 1)}"
        return Window(None, f"±{octaves:g} octaves hold {points} at width {width}, expected at least 3"), optima
    half, narrow, wide = (shift_ci[1] - shift_ci[0]) / 2, min(optima), max(optima)
    tried = sorted(by_width[narrow])
    step = min(np.diff(tried))
    if abs(shift) <= max_shift and regret < max_regret:
        verdict = "PASS"
        message = f"the optimum moves by {shift:+.2f} octaves from width {narrow} to {moved}; regret {regret:.2%}"
    elif regret < max_regret and (abs(shift) <= step or abs(shift) - half <= max_shift):
        verdict = "INCONCLUSIVE"
        message = (
            f"within resolution: the optimum moves by {shift:+.2f} ± {half:.2f} octaves on a grid of {step:g}, "
            f"with a regret of {regret:.2%}; more seeds or a finer grid would tell"
        )
    else:
        verdict = "FAIL"
        message = (
            f"the optimum moves by {shift:+.2f} ± {half:.2f} octaves from width {narrow} to {moved} "
            f"(at most {max_shift:g}); with the narrowest's, width {wide} loses {regret:.2%} (at most {max_regret:.0%})"
        )
    return Window(verdict, message, shift, shift_ci, regret), optima


def _move(
    by_width: dict[int, dict[float, dict[int, float]]], optima: dict[int, Optimum]
) -> tuple[float, tuple[float, float], float, int]:
    """(the move furthest from the narrowest width's optimum, 95% of it, regret at the widest, the width moved to)."""
    narrow, wide = min(optima), max(optima)
    base = optima[narrow]
    moved = max(
        (o for o in optima.values() if o.width != narrow), key=lambda o: abs(o.log2_lr_optimum - base.log2_lr_optimum)
    )
    shift = moved.log2_lr_optimum - base.log2_lr_optimum
    half = math.hypot(*((o.ci[1] - o.ci[0]) / 2 for o in (moved, base)))
    regret = _regret(by_width[wide], optima[wide], base.log2_lr_optimum)
    return shift, (shift - half, shift + half), regret, moved.width


def _octaves(windows: Iterable[float]) -> str:
    """`±0.5, ±1 and ±2 octaves`."""
    words = [f"±{octaves:g}" for octaves in windows]
    return f"{' and '.join(filter(None, (', '.join(words[:-1]), words[-1])))} octaves"


def _dissent(judged: dict[float, Window]) -> str:
    """Which windows say what, a verdict at a time."""
    said: dict[str, dict[float, Window]] = {}
    for octaves, window in judged.items():
        said.setdefault(window.verdict, {})[octaves] = window
    return "; ".join(
        f"{verdict} within {_octaves(windows)} of the best (shift "
        f"{', '.join(f'{w.shift_octaves:+.2f}' for w in windows.values())}; regret "
        f"{', '.join(f'{w.regret:.2%}' for w in windows.values())})"
        for verdict, windows in said.items()
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
