"""Transfer statistics: optima, intervals, edges, divergence, resolution, forecasts, on losses with a known answer."""

import json
import math
from dataclasses import replace
from pathlib import Path

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
    optimum = fit_optimum(64, curves(rows)[64], octaves=2)
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


FINE = [2.0 ** (k / 2) for k in range(-20, -7)]  # half octaves from -10 to -4


def shaped(valley, widths=(64, 128, 256, 512), seeds=3, noise=0.0, grid=FINE, seed=0):
    """Trials whose loss is 5 + 20/width + valley(width, octaves right of 2^-7), with noise of each trial's own."""
    generator = np.random.default_rng(seed)
    return [
        Trial(w, s, lr, 5 + 20 / w + valley(w, math.log2(lr) + 7) + noise * generator.normal())
        for w in widths for s in range(seeds) for lr in grid
    ]  # fmt: skip


def asymmetric(width, x):
    return 0.08 * x**2 if x < 0 else 0.3 * x**2


def drift(width, x):
    return 0.1 * (x + 0.7 * math.log2(width / 64)) ** 2


def plateau_then_wall(width, x):
    """To the left one parabola for all; to the right a plateau at the narrow widths and a wall at the wide ones."""
    if x <= 0:
        return 0.12 * x**2
    return min(0.12 * x**2, 0.02) if width < 256 else 0.12 * x**2 + 0.25 * x**3


@pytest.mark.parametrize(
    ("valley", "verdicts"),
    [
        (lambda w, x: 0.1 * x**2, "PASS PASS PASS PASS"),
        (asymmetric, "PASS PASS PASS PASS"),  # a vertex that is off is off by the same at every width
        (drift, "FAIL FAIL FAIL FAIL"),
        (lambda w, x: asymmetric(w, x + 0.8 * math.log2(w / 64)), "FAIL FAIL FAIL FAIL"),
        (plateau_then_wall, "PASS PASS FAIL FAIL"),
    ],
    ids=["a parabola", "a valley steep on one side", "a parabola that moves", "a steep one that moves", "two shapes"],
)
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_a_verdict_is_what_all_four_windows_say(valley, verdicts, noise):
    found = judge(shaped(valley, noise=noise))
    assert [w.verdict for w in found.windows.values()] == verdicts.split()
    agreed = set(verdicts.split())
    assert found.verdict == (agreed.pop() if len(agreed) == 1 else "INCONCLUSIVE")
    assert (found.shift_octaves, found.regret) == (found.windows[1.0].shift_octaves, found.windows[1.0].regret)


def test_windows_that_disagree_are_named_with_what_they_say():
    message = judge(shaped(plateau_then_wall)).message
    assert "PASS within ±0.5 and ±1 octaves" in message
    assert "FAIL within ±1.5 and ±2 octaves" in message
    assert message.count("shift") == message.count("regret") == 2


def test_a_window_with_fewer_than_three_points_is_not_judged_and_says_so():
    found = judge(trials(lambda w: -7.0))  # whole octaves
    assert [w.verdict for w in found.windows.values()] == [None, "PASS", "PASS", "PASS"]
    assert found.windows[0.5].message == "±0.5 octaves hold 1 point at width 64, expected at least 3"
    assert found.windows[0.5].shift_octaves is None
    assert "(judged within ±1, ±1.5 and ±2 octaves)" in found.message
    assert found.window_octaves == 2.0  # two steps of this grid


def test_a_grid_too_coarse_for_any_window_is_not_judged():
    found = judge(trials(lambda w: -7.0, grid=[2.0**k for k in (-13, -10, -7, -4, -1)]))
    assert found.verdict == "INCONCLUSIVE"
    assert "too coarse" in found.message
    assert all(w.verdict is None for w in found.windows.values())


def test_an_optimum_has_the_parabola_that_was_fitted():
    for width, optimum in judge(shaped(asymmetric, noise=0.01)).widths.items():
        a, b, _ = optimum.parabola
        assert -b / (2 * a) == pytest.approx(optimum.log2_lr_optimum, abs=1e-9)
        assert np.polyval(optimum.parabola, optimum.log2_lr_optimum) == pytest.approx(optimum.loss, abs=1e-9)
        assert optimum.window[1] - optimum.window[0] == 2.0
        assert optimum.curvature == a, width
    hill = fit_optimum(64, curves(shaped(lambda w, x: -0.1 * x**2))[64])
    assert hill.parabola is None


def test_noise_alone_rarely_condemns_an_optimum_that_stays():
    """A valley of 0.1 nats an octave squared under noise that moves single points by an octave's worth."""
    staying = [judge(shaped(lambda w, x: 0.1 * x**2, noise=0.05, seed=k)).verdict for k in range(16)]
    assert staying.count("FAIL") <= 1
    drifting = [judge(shaped(drift, noise=0.05, seed=k)).verdict for k in range(8)]
    assert "PASS" not in drifting


def random_trials(seed: int, noise: float) -> list[Trial]:
    generator = np.random.default_rng(seed)
    left, right, drift = generator.uniform(0.03, 0.3), generator.uniform(0.03, 0.6), generator.normal() * 0.2
    return shaped(
        lambda w, x: (left if x + drift * math.log2(w) < 0 else right) * (x + drift * math.log2(w / 64)) ** 2,
        noise=noise, seed=seed,
    )  # fmt: skip


def moved(rows: list[Trial], octaves: float = 0.0, more: float = 0.0, times: float = 1.0) -> list[Trial]:
    return [replace(t, lr=t.lr * 2.0**octaves, loss=t.loss * times + more) for t in rows]


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.01, 0.05]), st.integers(-16, 16), st.data())
def test_no_verdict_depends_on_where_the_grid_lies_or_on_the_order_of_trials(seed, noise, eighths, data):
    rows = random_trials(seed, noise)
    there = judge(data.draw(st.permutations(moved(rows, octaves=eighths / 8))))
    here = judge(rows)
    assert there.verdict == here.verdict
    assert [w.verdict for w in there.windows.values()] == [w.verdict for w in here.windows.values()]
    assert there.shift_octaves == pytest.approx(here.shift_octaves, abs=1e-6)
    assert there.regret == pytest.approx(here.regret, abs=1e-9)
    for width, optimum in here.widths.items():
        assert there.widths[width].log2_lr_optimum == pytest.approx(optimum.log2_lr_optimum + eighths / 8, abs=1e-6)


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.01, 0.05]), st.floats(-3, 50), st.sampled_from([0.5, 2.0, 4.0]))
def test_the_optimum_depends_on_the_losses_differences_only(seed, noise, more, times):
    """Regret is a share of the loss, so nats that are added to all change it, and nothing else; a unit changes none."""
    rows = random_trials(seed, noise)
    here, raised, scaled = judge(rows), judge(moved(rows, more=more)), judge(moved(rows, times=times))
    for octaves, window in here.windows.items():
        for other in (raised.windows[octaves], scaled.windows[octaves]):
            assert other.shift_octaves == pytest.approx(window.shift_octaves, abs=1e-6)
            assert other.shift_ci == pytest.approx(window.shift_ci, abs=1e-6)
    assert scaled.verdict == here.verdict
    assert scaled.regret == pytest.approx(here.regret, abs=1e-9)
    own = here.regret and (here.regret, raised.regret)
    if own and raised.regret:  # nats lost are the same
        loss = min(t.loss for t in rows if t.width == 512)
        assert raised.regret * (loss + more) == pytest.approx(here.regret * loss, rel=0.05, abs=1e-6)


@pytest.mark.parametrize(
    ("sweep", "parametrization", "verdict"),
    [("mup", "mup", "PASS"), ("mup", "sp", "FAIL"), ("crystalcoder", "crystalcoder", None)],
)
def test_the_documented_verdicts_are_what_their_trials_say(sweep, parametrization, verdict):
    """docs/mup/transfer-*: the numbers of transfer.json are made from the trials.json beside it, by today's rules."""
    from crystal.sweeps.sweep import as_trials

    folder = Path(__file__).parents[2] / "docs" / "mup" / f"transfer-{sweep}"
    written = json.loads((folder / "transfer.json").read_text())
    if parametrization != written["parametrization"]:
        written = written["beside"][parametrization]
    found = judge(as_trials(json.loads((folder / "trials.json").read_text()), parametrization))
    assert (found.verdict, found.message) == (written["verdict"], written["message"])
    assert found.verdict == verdict or verdict is None
    assert found.shift_octaves == pytest.approx(written["shift_octaves"])
    assert {f"{k:g}": w.verdict for k, w in found.windows.items()} == {
        k: w["verdict"] for k, w in written["windows"].items()
    }
