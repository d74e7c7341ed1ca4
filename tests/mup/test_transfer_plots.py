"""The transfer picture shows what was measured and what was fitted."""

import math

import numpy as np
import pytest

from crystal.mup.transfer import Trial, judge
from crystal.mup.transfer_plots import draw_transfer, figure


def trials(lost=()):
    """Two widths with valleys at -6 and -6.5, three seeds; lost: (width, log2 lr) where seed 1 diverges."""
    return [
        Trial(width, seed, 2.0**x, 5 + 0.2 * (x - best) ** 2 + 0.01 * seed, (width, x) in lost and seed == 1)
        for width, best in ((64, -6.0), (128, -6.5))
        for x in np.arange(-9, -3.9, 0.5)
        for seed in (1, 2, 3)
    ]


def drawn(lost=()):
    made = trials(lost)
    verdict = judge(made)
    return verdict, figure({"mup": (verdict, made)}).axes[0]


def test_the_parabola_that_was_fitted_is_drawn_over_the_points_it_was_fitted_to():
    verdict, ax = drawn()
    thick = [line for line in ax.lines if line.get_linewidth() > 2]
    assert len(thick) == 2
    for line, best in zip(thick, verdict.widths.values(), strict=True):
        x, y = line.get_data()
        assert (x[0], x[-1]) == pytest.approx(best.window)
        assert y.min() == pytest.approx(best.loss, abs=1e-3)
        assert x[y.argmin()] == pytest.approx(best.log2_lr_optimum, abs=0.05)


def test_every_seed_is_a_point_and_a_cross_stands_where_one_diverged():
    lost = {(64, -4.0), (64, -4.5), (128, -4.0)}
    _, ax = drawn(lost)
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert sum(len(line.get_xdata()) for line in points) == 2 * 11 * 3 - 3
    crosses = [sorted(line.get_xdata()) for line in ax.lines if line.get_marker() == "x"]
    assert crosses == [[-4.5, -4.0], [-4.0]]
    means = [line for line in ax.lines if line.get_linewidth() == 0.9]
    assert [len(line.get_xdata()) for line in means] == [9, 10], "a mean needs all its seeds"


def test_the_title_has_the_verdict_of_every_window_and_the_legend_says_what_a_cross_means():
    verdict, ax = drawn()
    title = ax.get_title()
    assert title.startswith(f"mup: {verdict.verdict}")
    assert all(f"±{octaves:g}" in title for octaves in verdict.windows)
    said = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert "a seed diverged: not in mean or fit" in said
    assert {"a seed", "fitted parabola", "width 64", "width 128"} <= set(said)


@pytest.mark.parametrize(("name", "start"), [("t.png", b"\x89PNG"), ("t.svg", b"<?xm"), (".t.png.1.tmp", b"\x89PNG")])
def test_the_format_follows_the_name(name, start, tmp_path):
    made = trials()
    draw_transfer({"a$b": (judge(made), made)}, tmp_path / name)
    assert (tmp_path / name).read_bytes()[:4] == start
    assert not math.isnan(judge(made).regret)
