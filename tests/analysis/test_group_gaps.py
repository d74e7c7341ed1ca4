"""Means, shares and gaps of groups whose texts come in clusters, against their definitions and in simulations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal.analysis.group_gaps import MIN_TITLES, Scores, by_group, gap, holm, student, summary


def of(groups: dict[str, list[list[float]]]) -> Scores:
    """Scores by group and title."""
    values = [x for titles in groups.values() for texts in titles for x in texts]
    keys = [(g, str(t)) for g, titles in groups.items() for t, texts in enumerate(titles) for _ in texts]
    return Scores.of(values, keys)


def test_means_errors_and_shares_are_those_of_the_texts():
    scores = of({"a": [[0.5, 0.1], [-0.4], [0.0, 0.05, -0.05], [0.2], [0.04]]})
    found = summary(scores)
    assert found["n"] == 8
    assert found["titles"] == 5
    assert found["mean"] == pytest.approx(scores.values.mean())
    assert found["std"] == pytest.approx(scores.values.std())
    assert [found[k]["share"] for k in ("positive", "neutral", "negative", "zero")] == [0.5, 0.25, 0.25, 0.125]
    residuals = [
        sum(x - found["mean"] for x in texts) for texts in ([0.5, 0.1], [-0.4], [0.0, 0.05, -0.05], [0.2], [0.04])
    ]
    assert found["stderr"] == pytest.approx((5 / 4 * sum(r * r for r in residuals)) ** 0.5 / 8)
    low, high = found["interval"]
    assert (high - low) / 2 == pytest.approx(student(4) * found["stderr"])
    assert low < found["mean"] < high


def test_texts_of_a_title_that_say_the_same_count_once():
    """Each text ten times changes neither an interval of the mean nor one of a share."""
    titles = [[0.5], [-0.2], [0.3], [0.0], [0.9], [-0.7]]
    once, often = summary(of({"a": titles})), summary(of({"a": [texts * 10 for texts in titles]}))
    assert often["n"] == 60
    assert often["interval"] == pytest.approx(once["interval"])
    assert often["positive"]["interval"] == pytest.approx(once["positive"]["interval"], abs=0.06)


def test_groups_weigh_as_they_were_published_however_many_were_asked():
    keys = [("a", f"{i}") for i in range(5)] + [("b", f"{i}") for i in range(5)]
    found = summary(Scores.of([1.0] * 5 + [0.0] * 5, keys, {"a": 100, "b": 300}))
    assert found["mean"] == pytest.approx(0.25)
    assert found["positive"]["share"] == pytest.approx(0.25)


def test_a_group_of_few_titles_has_no_interval_and_no_part_in_the_gap():
    rng = np.random.default_rng(0)
    scores = of({g: [[x] * 30 for x in rng.normal(m, 0.1, n)] for g, m, n in (("a", 0, 9), ("b", 0, 8), ("c", 0.9, 3))})
    assert by_group(scores)["c"]["interval"] is None
    assert by_group(scores)["c"]["stderr"] is None
    found = gap(scores)
    assert found["few"] == {"c": 3}
    assert {found["highest"], found["lowest"]} == {"a", "b"}
    assert gap(of({"a": [[0.1]] * 9, "c": [[0.5]] * 3}))["p"] is None


def test_a_gap_that_is_there_is_found_and_its_interval_holds_it():
    rng = np.random.default_rng(1)
    scores = of({g: [list(rng.normal(m + rng.normal(0, 0.1), 0.2, 3)) for _ in range(40)]
                 for g, m in (("low", -0.2), ("mid", 0.0), ("high", 0.2))})  # fmt: skip
    found = gap(scores)
    assert found["p"] < 0.001
    assert (found["highest"], found["lowest"]) == ("high", "low")
    assert 0.1 < found["interval"][0] < 0.4 < found["interval"][1] < 0.6
    assert found == gap(scores)  # a fixed seed


def test_without_a_difference_a_gap_is_seldom_called_one():
    """Titles whose texts are alike, in groups of unlike sizes: 5 % at a level of 5 %, give or take."""
    rng = np.random.default_rng(2)
    wrong = held = 0
    for seed in range(300):
        groups = {g: [list(rng.normal(rng.normal(0, 0.3), 0.1, rng.integers(1, 6))) for _ in range(n)]
                  for g, n in (("a", 5), ("b", 12), ("c", 30))}  # fmt: skip
        found = gap(of(groups), seed, 59)
        wrong += found["p"] <= 0.05
        held += found["interval"][0] == 0
    assert wrong <= 30  # 15 and four standard deviations of that
    assert held >= 270


def test_texts_that_all_score_alike_leave_no_gap():
    found = gap(of({g: [[0.0, 0.0]] * 6 for g in "ab"}))
    assert (found["value"], found["p"], found["interval"], found["clearest"]) == (0.0, 1.0, None, None)
    assert summary(of({"a": [[0.0]] * 6}))["interval"] is None


@given(
    st.lists(
        st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=3), min_size=1, max_size=7), min_size=1, max_size=4
    )
)
def test_any_scores_give_numbers_within_bounds(groups):
    scores = of({str(i): titles for i, titles in enumerate(groups)})
    own, found = summary(scores), gap(scores, draws=20)
    assert -1 <= own["mean"] <= 1
    assert 0 <= own["std"] <= 1.000001
    assert sum(own[k]["share"] for k in ("positive", "neutral", "negative")) == pytest.approx(1)
    if own["interval"]:
        assert -1 <= own["interval"][0] <= own["mean"] + 1e-9
        assert own["mean"] - 1e-9 <= own["interval"][1] <= 1
    if sum(len(titles) >= MIN_TITLES for titles in groups) < 2:
        assert found["value"] is None
        assert found["p"] is None
    else:
        assert 0 <= found["value"] <= 2
        assert 0 < found["p"] <= 1
        if found["interval"]:
            assert 0 <= found["interval"][0] <= found["value"] + 1e-9 <= found["interval"][1] + 2e-9 <= 2.00001


def test_holm_corrects_over_those_that_were_tested():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None]) == [None]
    assert holm([]) == []


@pytest.mark.parametrize(("freedom", "point"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_students_points_are_those_of_the_tables(freedom, point):
    assert student(freedom) == pytest.approx(point, rel=0.02)
