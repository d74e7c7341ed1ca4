"""LR schedules: the published values, the forms, and how they fit a run at another scale."""

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal.config import load_yaml, parse
from crystal.curriculum.config import CurriculumConfig
from crystal.curriculum.resolve import resolve
from crystal.curriculum.schedule import Segment, fit

# LLM360/crystalcoder-train and amber-train, evaluated by hand: facts/llm360.md §6.2
PUBLISHED = {
    ("crystalcoder", "stage1"): {
        1: "1.3953e-4", 43: "6e-3", 86: "1.2e-2", 1500: "1.194295e-2", 10000: "1.159999e-2",
        33000: "1.067198e-2", 55500: "9.764154e-3", 64500: "9.401022e-3", 79721: "8.786884e-3",
    },
    ("crystalcoder", "stage2"): {
        86: "8.7825e-3", 1500: "8.725454e-3", 18000: "8.059782e-3", 51000: "6.728437e-3",
        81000: "5.518124e-3", 114000: "4.186780e-3", 144000: "2.976467e-3", 174000: "1.766154e-3",
        207000: "4.348094e-4", 214387: "1.3679e-4",
    },
    ("crystalcoder", "stage3"): {
        138: "1e-3", 276: "2e-3", 1000: "1.952528e-3", 14000: "1.100131e-3", 27000: "2.477342e-4",
        27728: "2e-4",
    },
    ("amber", "pretrain"): {
        0: "0.0", 1: "1.5e-7", 100: "1.5e-5", 762: "1.143e-4", 1000: "1.5e-4", 2000: "3e-4",
        27432: "2.94231e-4", 68580: "2.62097e-4", 137160: "1.66557e-4", 205740: "7.00928e-5",
        273558: "3.00052e-5", 274320: "3e-5",
    },
}  # fmt: skip


def published_stage(curriculum: str, stage: str):
    config = load_yaml(f"configs/curricula/{curriculum}.yaml")
    section = parse(CurriculumConfig, config.mapping["curriculum"], config, ("curriculum",))
    return next(s for s in resolve(section, config).stages if s.name == stage)


@pytest.mark.parametrize(
    ("curriculum", "stage", "t", "lr"),
    [(*where, t, lr) for where, table in PUBLISHED.items() for t, lr in table.items()],
)
def test_published_values(curriculum, stage, t, lr):
    digits, exponent = len(Decimal(lr).as_tuple().digits), Decimal(lr).as_tuple().exponent
    rounding = 0.5 * 10.0**exponent if digits > 4 else 0.0  # short ones are exact
    assert published_stage(curriculum, stage).lr_at(t) == pytest.approx(float(lr), rel=1e-6, abs=rounding)


def line(t, a, b, lr_a, lr_b):
    return lr_a + (lr_b - lr_a) * (t - a) / (b - a)


@pytest.mark.parametrize(
    ("stage", "t", "lr"),
    [
        ("stage1", 1, 0.012 / 86),
        ("stage1", 55500, line(55500, 86, 86 + 294337, 0.012, 0.00012408)),
        ("stage1", 79721, line(79721, 86, 86 + 294337, 0.012, 0.00012408)),
        ("stage2", 114000, line(114000, 86, 214387, 0.0087825, 0.00013679)),
        ("stage3", 14000, line(14000, 276, 27728, 0.002, 0.0002)),
    ],
)
def test_crystalcoder_is_two_lines(stage, t, lr):
    assert published_stage("crystalcoder", stage).lr_at(t) == pytest.approx(lr, rel=1e-12)


def test_amber_is_a_cosine():
    lr = 3e-5 + 0.5 * (3e-4 - 3e-5) * (1 + math.cos(math.pi * (68580 - 2000) / (274320 - 2000)))
    assert published_stage("amber", "pretrain").lr_at(68580) == pytest.approx(lr, rel=1e-12)


def test_first_step_of_crystalcoder_uses_lr_1_and_the_last_one_lr_of_all_steps():
    stage = published_stage("crystalcoder", "stage1")
    assert stage.lr_for_step(0) == stage.lr_at(1) == pytest.approx(0.012 / 86)
    assert stage.lr_for_step(85) == 0.012
    assert stage.lr_for_step(stage.steps - 1) == stage.lr_at(79721)


def test_first_step_of_amber_uses_lr_0():
    stage = published_stage("amber", "pretrain")
    assert stage.lr_for_step(0) == 0.0
    assert stage.lr_for_step(2000) == 3e-4


def test_warmup_stable_decay_and_what_comes_behind():
    wsd = fit([Segment(0, 1, 10), Segment(1, 1, 80), Segment(1, 0, 10, "sqrt")], 100)
    assert [wsd(t) for t in (0, 5, 10, 50, 90, 100, 1000)] == [0, 0.5, 1, 1, 1, 0, 0]
    assert wsd(92.5) == pytest.approx(1 - math.sqrt(0.25))


def test_where_segments_jump_the_ending_one_counts():
    jumping = fit([Segment(0, 1, 10), Segment(0.5, 0.25, 10)], 20)
    assert jumping(10) == 1
    assert 0.5 > jumping(10.01) > 0.49


@st.composite
def schedules(draw):
    pieces = draw(st.lists(st.integers(1, 5000), min_size=1, max_size=4))
    values = draw(st.lists(st.floats(0, 1), min_size=len(pieces) + 1, max_size=len(pieces) + 1))
    shapes = st.sampled_from(["linear", "cosine", "sqrt"])
    segments = [Segment(values[i], values[i + 1], n, draw(shapes)) for i, n in enumerate(pieces)]
    return segments, draw(st.integers(1, sum(pieces)))


@given(schedules(), st.integers(1, 5000))
def test_scaled_schedule_keeps_end_knots_and_bounds(drawn, steps):
    segments, published_steps = drawn
    whole, scaled = fit(segments, published_steps), fit(segments, published_steps, steps)
    assert scaled(steps) == whole(published_steps)
    assert scaled(0) == whole(0)
    values = [s.start for s in segments] + [s.end for s in segments]
    low, high = min(values) - 1e-15, max(values) + 1e-15
    assert all(low <= scaled(t) <= high for t in range(0, steps + 1, max(1, steps // 50)))
    if steps >= len(segments):
        places = [n * steps / published_steps for n in whole.knots]
        # rounding moves a knot by half a step, and keeping knots apart by at most one step for each before it
        assert all(abs(k - p) <= len(segments) for k, p in zip(scaled.knots, places, strict=True))
        assert all(scaled(k) == whole(n) for k, n in zip(scaled.knots, whole.knots, strict=True) if k < steps)


@given(st.integers(2, 300_000))
def test_a_warmup_keeps_at_least_one_step_and_reaches_the_peak(steps):
    scaled = fit([Segment(0, 0.012, 86), Segment(0.012, 0.00012408, 294337)], 79721, steps)
    warmup = scaled.knots[1]
    assert warmup >= 1
    assert abs(warmup - max(1, 86 * steps / 79721)) <= 0.5
    assert scaled(warmup) == 0.012
    assert scaled(steps) == pytest.approx(8.78688411854439e-3, rel=1e-12)


def test_the_shortest_warmup_can_be_asked_for_and_leaves_the_published_run_alone():
    segments = [Segment(0, 0.012, 86), Segment(0.012, 0.00012408, 294337)]
    assert fit(segments, 79721, 80, min_warmup=8).knots == (0, 8, 80)
    assert fit(segments, 79721, 4, min_warmup=8).knots == (0, 3, 4)
    assert fit(segments, 79721, min_warmup=1000).knots == (0, 86, 79721)


def test_same_proportions_same_values():
    segments = [Segment(0, 0.002, 276), Segment(0.002, 0.0002, 27452)]
    whole, half = fit(segments, 27728), fit(segments, 27728, 13864)
    assert all(half(t) == pytest.approx(whole(2 * t), rel=1e-12) for t in range(0, 13865, 101))
