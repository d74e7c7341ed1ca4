"""pass@k: the chance that one or more of k samples pass, estimated from n samples of which c passed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from crystal.evaluation.averages import mean
from crystal.evaluation.task import Metric


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k), Chen et al. 2021 (arXiv 2107.03374) equation 1: unbiased for any n >= k.

    As a product of k factors, so that no large number comes up. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"expected 0 <= c <= n and 1 <= k <= n, got n {n}, c {c}, k {k}")
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(min(k, n - c + 1)))


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> Metric:
    """The mean over items of pass@k, with its standard error over items. counts: (n, c) of each."""
    return mean([pass_at_k(n, c, k) for n, c in counts])
