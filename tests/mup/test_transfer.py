"""Transfer statistics: optima, intervals, edges, divergence, resolution, forecasts, on losses with a known answer."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal.mup.forecast import forecast
from crystal.mup.transfer import Trial, curves, fit_optimum, judge, metrics

GRID = [2.0**k for k in range(-12, -3)]


def trials(optimum, widths=(64, 128, 256, 512), curvature=0.05, seeds=3, noise=0.0, grid=GRID, lost_above=math.inf):
    """Losses 5 + 20/width + curvature * (log2 lr - optimum(width))^2, with noise that a seed's learning rates share,
    and noise of their own."""
    generator = np.random.default_rng(0)
    found = []
    for width in widths:
        for seed in range(seeds):
            shared = generator.normal() * noise
            for lr in grid:
                loss = 5 + 20 / width + curvature * (math.log2(lr) - optimum(width)) ** 2
                loss += shared + generator.normal() * noise / 3
                found.append(Trial(width, seed, lr, loss, diverged=math.log2(lr) > lost_above))
    return found


@settings(max_examples=30, deadline=None)
@given(st.floats(-10, -6), st.floats(0.01, 1))
def test_the_vertex_of_a_parabola_is_found(optimum, curvature):
    rows = trials(lambda w: optimum, curvature=curvature)
    found = fit_optimum(64, curves(rows)[64])
    assert found.log2_lr_optimum == pytest.approx(optimum, abs=1e-6)
    assert found.ci[0] <= optimum <= found.ci[1]
    assert found.loss == pytest.approx(5 + 20 / 64, abs=1e-6)
    assert found.edge == ""


def test_an_optimum_that_stays_passes():
    found = judge(trials(lambda w: -7.3, noise=0.01))
    assert found.verdict == "PASS"
    assert abs(found.shift_octaves) < 0.3
    assert found.regret < 0.002
    assert found.trials == 4 * 9 * 3


def test_an_optimum_that_moves_fails_and_says_by_how_much():
    found = judge(trials(lambda w: -6 - math.log2(w / 64), noise=0.01))
    assert found.verdict == "FAIL"
    assert found.shift_octaves == pytest.approx(-3, abs=0.3)
    assert found.shift_ci[0] <= -3 <= found.shift_ci[1] or abs(found.shift_octaves + 3) < 0.1
    # at width 512 the loss is 5 + 20/512, and 9 * 0.05 more with the narrowest's optimum
    assert found.regret == pytest.approx(0.45 / (5 + 20 / 512), rel=0.2)


def test_one_grid_step_without_regret_is_within_resolution():
    """Megatron's table: one grid step at the widest width, which must be neither pass nor fail."""
    found = judge(trials(lambda w: -7.2 + (0.7 if w == 512 else 0), curvature=0.01, noise=0.01))
    assert found.verdict == "INCONCLUSIVE"
    assert "within resolution" in found.message


@pytest.mark.parametrize(("optimum", "words"), [(-13, "smallest"), (-3, "largest")])
def test_an_optimum_on_the_grids_edge_is_not_judged(optimum, words):
    found = judge(trials(lambda w: optimum))
    assert found.verdict == "INCONCLUSIVE"
    assert words in found.message
    assert "grid's edge" in found.message


def test_an_optimum_beside_divergence_is_not_judged():
    found = judge(trials(lambda w: -6.0, lost_above=-6.5))
    assert found.verdict == "INCONCLUSIVE"
    assert found.diverged == 4 * 3 * 3
    assert "diverged" in found.message


def test_a_learning_rate_at_which_one_seed_diverges_is_not_an_optimum():
    rows = [
        Trial(t.width, t.seed, t.lr, 1.0 if lost else t.loss, diverged=False)
        if not lost
        else Trial(t.width, t.seed, t.lr, math.inf, True)
        for t in trials(lambda w: -8.0)
        for lost in [math.log2(t.lr) == -8 and t.seed == 0]
    ]
    optimum = fit_optimum(64, curves(rows)[64])
    assert optimum.log2_lr_optimum == pytest.approx(-8, abs=0.3)


def test_all_diverged_is_an_error_that_names_the_width():
    rows = [Trial(64, 0, lr, math.nan, True) for lr in GRID]
    with pytest.raises(ValueError, match="width 64"):
        fit_optimum(64, curves(rows)[64])


def test_metrics_measure_drift_and_curvature():
    found = judge(trials(lambda w: -6 - 0.5 * math.log2(w / 64))).widths
    measured = metrics(found)
    assert measured["drift_octaves_per_doubling"] == pytest.approx(-0.5, abs=0.01)
    assert measured["fit_residual_octaves"] == pytest.approx(0, abs=0.01)
    assert measured["nats_per_octave_of_error"] == pytest.approx(0.05, abs=1e-3)
    assert measured["asymptotic_loss"] == pytest.approx(5, abs=0.01)


def test_a_power_law_is_forecast_on_a_held_out_width():
    rows = [Trial(w, s, 0.01, 8 * w**-0.1 * math.exp(0.001 * (s - 1))) for w in (64, 128, 256, 512) for s in range(3)]
    found = forecast(rows)
    assert found.held_out_width == 512
    assert found.held_out_predicted == pytest.approx(found.held_out_measured, rel=1e-3)
    assert found.held_out_interval[0] < found.held_out_measured < found.held_out_interval[1]
    assert found.at(4096) == pytest.approx(8 * 4096**-0.1, rel=2e-3)
    with pytest.raises(ValueError, match="three widths"):
        forecast([t for t in rows if t.width < 200])
