"""95 % intervals of shares, means and their differences, and whether a difference is one."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964  # standard normal, two-sided 95 %


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Of hits out of n (Wilson 1927): it holds at 0 hits too, where it ends at 3.84 / (n + 3.84). n = 0: (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    share, square = hits / n, Z * Z / n
    middle = (share + square / 2) / (1 + square)
    reach = Z / (1 + square) * math.sqrt(share * (1 - share) / n + square / (4 * n))
    return max(middle - reach, 0.0) if hits else 0.0, min(middle + reach, 1.0) if hits < n else 1.0


def share_difference(hits: int, n: int, other_hits: int, other_n: int) -> tuple[float, float]:
    """Of one share less another (Newcombe 1998, from both Wilson intervals). Either n = 0: (-1, 1)."""
    if not n or not other_n:
        return -1.0, 1.0
    a, b = hits / n, other_hits / other_n
    (low_a, high_a), (low_b, high_b) = wilson(hits, n), wilson(other_hits, other_n)
    return a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """(mean, low, high) by the normal approximation; low and high are nan for a single value, None for none."""
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    reach = Z * _error(values) if n > 1 else math.nan
    return mean, mean - reach, mean + reach


def mean_difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float] | None:
    """(mean - mean of others, low, high), each with its own spread (Welch); None where either has under two values."""
    if len(values) < 2 or len(others) < 2:
        return None
    difference = math.fsum(values) / len(values) - math.fsum(others) / len(others)
    reach = Z * math.hypot(_error(values), _error(others))
    return difference, difference - reach, difference + reach


def stratified_difference(
    strata: Sequence[Sequence[float]], others: Sequence[Sequence[float]]
) -> tuple[float, float, float] | None:
    """`mean_difference` stratum by stratum, each of two values or more, weighted by the sizes of `strata`."""
    total = sum(map(len, strata))
    if not total:
        return None
    parts = [(len(a) / total, *mean_difference(a, b)) for a, b in zip(strata, others, strict=True)]
    difference = math.fsum(w * middle for w, middle, _, _ in parts)
    reach = math.sqrt(math.fsum((w * (high - middle)) ** 2 for w, middle, _, high in parts))
    return difference, difference - reach, difference + reach


def _error(values: Sequence[float]) -> float:
    n = len(values)
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)
