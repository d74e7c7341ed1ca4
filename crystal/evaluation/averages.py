"""Numbers over items, with standard errors over items: a mean, and a ratio of two sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

from crystal.evaluation.task import Metric


def mean(values: Sequence[float]) -> Metric:
    """The mean of one or more items; its standard error is that of the sample, None for a single item."""
    n = len(values)
    value = math.fsum(values) / n
    if n == 1:
        return Metric(value, None)
    return Metric(value, math.sqrt(math.fsum((x - value) ** 2 for x in values) / (n - 1) / n))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Metric:
    """sum(numerators) / sum(denominators) over one or more items, such as bits and bytes of documents.

    Its standard error is the delta method's: sqrt(n / (n - 1) * sum((a - r b)^2)) / sum(b) (Cochran 1977, 2.11), None
    for a single item.
    """
    n, whole = len(numerators), math.fsum(denominators)
    value = math.fsum(numerators) / whole
    if n == 1:
        return Metric(value, None)
    squares = math.fsum((a - value * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return Metric(value, math.sqrt(squares * n / (n - 1)) / whole)


def mean_of(metrics: Sequence[Metric]) -> Metric:
    """The unweighted mean of numbers over items that have nothing to do with one another."""
    value = math.fsum(metric.value for metric in metrics) / len(metrics)
    errors = [metric.stderr for metric in metrics]
    if any(error is None for error in errors):
        return Metric(value, None)
    return Metric(value, math.sqrt(math.fsum(error**2 for error in errors)) / len(metrics))


def mean_over_groups(values: Sequence[float], groups: Sequence[str | None]) -> Metric:
    """The mean over groups of the means within them, each group counted once, as the leaderboard does for MMLU.

    Its standard error is sqrt(sum of the groups' squared errors) / groups; a group of one item has the spread of the
    others, or None where all are.
    """
    inside: dict[str | None, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        inside.setdefault(group, []).append(float(value))
    means = [math.fsum(mine) / len(mine) for mine in inside.values()]
    squares = [math.fsum((x - m) ** 2 for x in mine) for m, mine in zip(means, inside.values(), strict=True)]
    freedom = len(values) - len(inside)
    pooled = math.fsum(squares) / freedom if freedom else None
    value = math.fsum(means) / len(means)
    if pooled is None:
        return Metric(value, None)
    errors = [
        (q / (len(mine) - 1) if len(mine) > 1 else pooled) / len(mine)
        for q, mine in zip(squares, inside.values(), strict=True)
    ]
    return Metric(value, math.sqrt(math.fsum(errors)) / len(means))
