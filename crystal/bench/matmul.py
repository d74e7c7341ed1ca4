"""How fast matrix products are on this machine now: the yardstick of dry runs, sweeps and benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LEAST_SECONDS = 0.2  # timed at once: a thread's CPU time is not exact to a millisecond on a virtual machine


def matmul_rate(
    dtype: str,
    rows: int = 1024,
    widths: Sequence[int] = (1024,),
    product: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.linear,
    clock: Callable[[], float] = time.perf_counter,
    tries: int = 1,
) -> float:
    """FLOP/s of the best product of [rows, 1024] with the transpose of a [width, 1024] weight, by `clock`.

    dtype: fp32 or bf16. tries: of each width, the best of which counts. Small models stay far below it.
    """
    kind, best = torch.float32 if dtype == "fp32" else torch.bfloat16, 0.0
    with torch.no_grad():
        for width in widths:
            x, weight = torch.randn(rows, 1024, dtype=kind), torch.randn(width, 1024, dtype=kind)
            product(x, weight)
            for _ in range(tries):
                begun, count = clock(), 0
                while (passed := clock() - begun) < LEAST_SECONDS:
                    product(x, weight)
                    count += 1
                best = max(best, 2 * rows * 1024 * width * count / passed)
    return best
