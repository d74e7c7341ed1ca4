"""pass@k against its definition, and averages over items with their standard errors."""

import itertools
import math
from statistics import mean as plain_mean
from statistics import stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal.evaluation.averages import mean, mean_of, ratio
from crystal.evaluation.pass_at_k import mean_pass_at_k, pass_at_k
from crystal.evaluation.task import Metric


@given(st.integers(1, 9), st.data())
def test_it_is_the_share_of_choices_of_k_samples_in_which_one_passes(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    chosen = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-12)


@given(st.integers(1, 3000), st.data())
def test_large_counts_agree_with_exact_binomials_and_stay_in_range(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-9)
    assert 0 <= pass_at_k(n, c, k) <= 1


def test_the_ends():
    assert [pass_at_k(20, c, 1) for c in (0, 5, 20)] == [0, 0.25, 1]
    assert pass_at_k(20, 11, 10) == 1  # fewer than ten failed
    assert pass_at_k(1_000_000, 1, 10) == pytest.approx(1e-5)


@pytest.mark.parametrize("bad", [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0), (0, 0, 1)])
def test_counts_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="expected 0 <= c <= n"):
        pass_at_k(*bad)


def test_its_expectation_does_not_depend_on_n():
    """Unbiased: over binomial draws it is 1 - (1 - p)^k, for every n."""
    p, k = 0.3, 4
    for n in (4, 7, 20):
        weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        expected = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
        assert expected == pytest.approx(1 - (1 - p) ** k)


def test_the_mean_over_items_has_its_standard_error():
    counts = [(20, 0), (20, 5), (20, 20), (20, 1)]
    values = [pass_at_k(n, c, 10) for n, c in counts]
    got = mean_pass_at_k(counts, 10)
    assert got.value == pytest.approx(plain_mean(values))
    assert got.stderr == pytest.approx(stdev(values) / 2)
    assert mean_pass_at_k([(1, 1)], 1) == Metric(1.0, None)


def test_the_standard_error_of_a_ratio_is_its_spread_over_samples():
    rng = np.random.default_rng(0)
    got, errors = [], []
    for _ in range(2000):
        size = rng.integers(20, 400, 60).astype(float)
        found = ratio((size * rng.normal(1.2, 0.3, 60)).tolist(), size.tolist())
        got.append(found.value)
        errors.append(found.stderr)
    assert np.mean(errors) == pytest.approx(np.std(got), rel=0.05)
    assert ratio([6.0], [3.0]) == Metric(2.0, None)


def test_a_ratio_over_equal_sizes_is_a_mean():
    values = [0.5, 1.5, 1.75, 3.0]
    one, other = ratio([4 * v for v in values], [4.0] * 4), mean(values)
    assert (one.value, one.stderr) == pytest.approx((other.value, other.stderr))


def test_the_mean_of_means_adds_their_errors():
    assert mean_of([Metric(1.0, 0.3), Metric(3.0, 0.4)]) == Metric(2.0, pytest.approx(0.25))
    assert mean_of([Metric(1.0, 0.3), Metric(3.0, None)]).stderr is None
