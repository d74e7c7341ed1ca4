"""Plots of a run and of a curriculum. Colours: Okabe and Ito's, which colour-blind readers tell apart."""

from __future__ import annotations

from pathlib import Path

from crystal.config import ConfigError
from crystal.curriculum import Curriculum
from crystal.training.metrics import read_metrics

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKS = "osD^vPX*"


def _figure(rows: int, height: float):
    from matplotlib.figure import Figure  # without pyplot, which keeps every figure it made

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True, squeeze=False)


def plot_losses(run_dir: Path, curriculum: Curriculum) -> Path:
    """run_dir/loss.png: validation loss of every source, training loss and LR over steps, stages marked."""
    records = list(read_metrics(run_dir))
    validated = [r for r in records if r.get("val_loss")]
    trained = [r for r in records if r.get("loss") is not None]
    figure, ((losses,), (rates,)) = _figure(2, 6.5)
    sources = sorted({s for r in validated for s in r["val_loss"]})
    losses.plot([r["step"] for r in trained], [r["loss"] for r in trained], color="#bbbbbb", lw=0.8, label="training")
    for i, source in enumerate(sources):
        points = [(r["step"], v) for r in validated if (v := r["val_loss"].get(source)) is not None]
        losses.plot(
            *(zip(*points, strict=True) if points else ((), ())),
            color=COLOURS[i % 8],
            marker=_MARKS[i % 8],
            ms=4,
            label=f"{source}, held out",
        )
    losses.set_ylabel("loss, nats per token")
    if trained:  # the first steps fall from 28 nats and would flatten the rest
        later = [v for r in validated[1:] for v in r["val_loss"].values() if v is not None]
        losses.set_ylim(0, 1.15 * max([trained[0]["loss"] / 3, *later]))
    losses.legend(fontsize=8, ncols=2)
    rates.plot([r["step"] for r in trained], [r["lr"] for r in trained], color=COLOURS[0])
    rates.set_ylabel("base lr")
    rates.set_xlabel("step")
    _mark_stages((losses, rates), curriculum)
    path = run_dir / "loss.png"
    _save(figure, path)
    return path


def plot_curriculum(curriculum: Curriculum, path: Path) -> None:
    """LR over the whole curriculum, and each stage's mix as a stacked bar as wide as the stage."""
    figure, ((rates,), (mix,)) = _figure(2, 7)
    names = list(dict.fromkeys(_short(name) for s in curriculum.stages for name in s.weights))
    for stage in curriculum.stages:
        steps = sorted({int(stage.steps * i / 400) for i in range(401)} | set(stage.schedule.knots))
        rates.plot([stage.first_step + t for t in steps], [stage.lr_at(t) for t in steps], color=COLOURS[0])
        bottom = 0.0
        for name, weight in stage.weights.items():
            i = names.index(_short(name))
            label = names[i] if names[i] not in mix.get_legend_handles_labels()[1] else None
            mix.bar(
                stage.first_step, weight, stage.steps, bottom, align="edge", label=label, edgecolor="white",
                color=COLOURS[i % 8], hatch=("", "///", "...", "xxx")[i // 8 % 4],
            )  # fmt: skip
            bottom += weight
    rates.set_ylabel("base lr")
    mix.set_ylabel("share of sequences")
    mix.set_xlabel("step")
    figure.legend(*mix.get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside lower center")
    _mark_stages((rates, mix), curriculum)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the plot cannot be written: {error}") from None


def _short(name: str) -> str:
    """One name for the parts and versions of a published source: SlimPajama/ArXiv, StarCoder, stage3/css."""
    parts = name.split("/")
    return "/".join(part.split("_")[0] for part in dict.fromkeys((parts[0], parts[-1])))


def _mark_stages(axes: tuple, curriculum: Curriculum) -> None:
    for stage in curriculum.stages:
        for axis in axes:
            axis.axvline(stage.first_step, color="#555555", lw=0.8, ls=":")
        axes[0].annotate(stage.name, (stage.first_step, 1.01), xycoords=("data", "axes fraction"), fontsize=8)
