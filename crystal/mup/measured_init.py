"""Initial sizes by drawing: for initialisers that cannot be read (orthogonal, computed from other numbers)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from crystal.mup.observe import Observed

SEEDS = 8


@dataclass(frozen=True)
class Size:
    """Root mean square of a tensor over several starts, and its relative standard error."""

    rms: float
    error: float


def measured_inits(
    factory: Callable[[int], nn.Module], widths: tuple[int, ...], seen: dict[int, Observed], second: int
) -> dict[str, tuple[Size, Size]]:
    """Sizes at the base and the second width of tensors whose draw is unknown at either. Leaves torch's seed as it
    was."""
    base, other = widths[0], second
    names = [n for n, d in seen[base].draws.items() if "unknown" in (d.kind, *(p.kind for p in d.parts))]
    if not names:
        return {}
    with torch.random.fork_rng(devices=[]):
        before, after = _sizes(factory, base, names), _sizes(factory, other, names)
    return {name: (before[name], after[name]) for name in names}


@torch.no_grad()
def _sizes(factory: Callable[[int], nn.Module], width: int, names: list[str]) -> dict[str, Size]:
    squares: dict[str, list[float]] = {name: [] for name in names}
    counts = dict.fromkeys(names, 1)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        weights = dict(factory(width).named_parameters())
        for name in names:
            squares[name].append(weights[name].float().square().mean().item())
            counts[name] = weights[name].numel()
    found = {}
    for name in names:
        mean = sum(squares[name]) / SEEDS
        fixed = max(squares[name]) - min(squares[name]) <= 1e-6 * mean  # the same at every start
        found[name] = Size(math.sqrt(mean), 0.0 if fixed else 1 / math.sqrt(2 * counts[name] * SEEDS))
    return found
