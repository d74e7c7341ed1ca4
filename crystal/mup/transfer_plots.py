"""Loss against learning rate, a curve a width, a panel a parametrization: does the minimum stay where it is?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from crystal.mup.transfer import Transfer, Trial, curves


def draw_transfer(results: Mapping[str, tuple[Transfer, Sequence[Trial]]], path: Path) -> None:
    """Write a PNG. results: parametrization → (verdict, trials). Widths run dark to light in cividis, which stays
    readable in grey and to colour-blind eyes; each optimum is a diamond with its interval."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(results) + 0.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False, sharey=True, sharex=True)[0]
    for ax, (name, (transfer, trials)) in zip(axes, results.items(), strict=True):
        by_width = curves(trials)
        shades = matplotlib.colormaps["cividis"](np.linspace(0.05, 0.9, len(by_width)))
        for shade, (width, curve) in zip(shades, by_width.items(), strict=True):
            kept = {x: list(ys.values()) for x, ys in curve.items() if ys}
            x = sorted(kept)
            mean = [np.mean(kept[k]) for k in x]
            low, high = ([f(kept[k]) for k in x] for f in (min, max))
            ax.fill_between(x, low, high, color=shade, alpha=0.18, linewidth=0)
            ax.plot(x, mean, color=shade, marker=".", label=f"width {width}")
            best = transfer.widths[width]
            ends = [[best.log2_lr_optimum - best.ci[0]], [best.ci[1] - best.log2_lr_optimum]]
            ends = np.clip(ends, 0, None)
            ax.errorbar(
                [best.log2_lr_optimum], [best.loss], xerr=ends, color=shade, marker="D", markersize=6,
                markeredgecolor="black", capsize=3, zorder=5,
            )  # fmt: skip
        lost = [(k, w) for w, curve in by_width.items() for k, ys in curve.items() if not ys]
        for k, _ in lost:
            ax.plot([k], [1.0], marker="x", color="#D55E00", transform=ax.get_xaxis_transform(), clip_on=False)
        ax.set_title(
            f"{name}: {transfer.verdict}\nshift {transfer.shift_octaves:+.2f} octaves, regret {transfer.regret:.2%}",
            fontsize=10,
        )
        ax.set_xlabel("log2 of the base learning rate")
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("held-out loss, nats a token (band: all seeds)")
    least = min(o.loss for transfer, _ in results.values() for o in transfer.widths.values())
    worst = max(o.loss for transfer, _ in results.values() for o in transfer.widths.values())
    axes[0].set_ylim(least - 0.1, worst + 2 * (worst - least) + 0.3)
    axes[-1].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
