"""The static audit over depth: does a model of another depth do what CompleteP says?

With m_L = depth / base depth and alpha in [1/2, 1] (Dey et al. 2025, "Don't be lazy", Table 1): residual branches
x m_L^-alpha, lr of everything inside blocks x m_L^(alpha-1), initial weights unchanged. A 1/sqrt(2L) in the init of
the residual-out matrices (GPT-2) does the same work as the branch multiplier, so together they count depth twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from crystal.mup.forward_trace import follow, multipliers
from crystal.mup.observe import Observed, observe
from crystal.mup.rules import PARAMETRIZATIONS
from crystal.mup.tolerances import AUDIT_EXPONENT, AUDIT_TWICE
from crystal.mup.verdict import Report, Row

_SOURCE = PARAMETRIZATIONS["completep"].source


def audit_depth(
    factory: Callable[[int], nn.Module],
    *,
    depths: tuple[int, int],
    alpha: float = 1.0,
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    calls: Mapping[str, Callable[[nn.Module], Any]] | None = None,
    residual_out: Sequence[str] = ("attn.out.weight", "mlp.down.weight"),
    blocks: str = "blocks.",
) -> Report:
    """Audit a family of models of one width by depth (number of layers).

    factory, optimizer, calls: as in `audit`. residual_out: endings of the names of matrices that write into the
    residual stream; blocks: start of the names of tensors inside blocks. Only names that both depths have count.
    """
    began = time.perf_counter()
    seen = [observe(lambda depth=depth: factory(depth), optimizer, calls) for depth in depths]
    m = depths[1] / depths[0]
    rows = []
    for name in seen[0].draws:
        writes, inside = name.endswith(tuple(residual_out)), name.startswith(blocks)
        branch = _forward(seen, name, m) if writes else None
        rows += [
            _row(name, "init over depth", _init(seen, name, m), 0.0, depths, _init_reason(branch)),
            _row(name, "lr over depth", _lr(seen, name, m), alpha - 1 if inside else 0.0, depths, "its LR is off"),
            _row(name, "forward over depth", branch, -alpha if writes else 0.0, depths, _BRANCH),
        ]
    return Report([row for row in rows if row is not None], time.perf_counter() - began)


_BRANCH = "the residual branch is not multiplied by m_L^-alpha"


def _init_reason(branch: float | None) -> str:
    if branch is not None and branch < -AUDIT_TWICE:
        return "depth is counted twice, by the branch multiplier and by the 1/sqrt(2L) in the init"
    return "its init sigma depends on depth"


def _init(seen: list[Observed], name: str, m: float) -> float | None:
    stds = [o.draws[name].std for o in seen]
    return _exponent(*stds, m) if all(stds) else None


def _lr(seen: list[Observed], name: str, m: float) -> float | None:
    if any(o.groups is None or name not in o.groups for o in seen):
        return None
    return _exponent(*(o.groups[name].lr for o in seen), m)


def _forward(seen: list[Observed], name: str, m: float) -> float | None:
    found = []
    for observed in seen:
        for graph in list(observed.graphs.values())[:1]:
            factors = multipliers(follow([graph])).outputs.get((name, "matmul"), ())
            found.append(max(factors, default=None))
    return _exponent(*found, m) if len(found) == 2 and None not in found else None


def _exponent(before: float, after: float, m: float) -> float:
    return math.log(after / before) / math.log(m) + 0.0


def _row(name: str, quantity: str, found: float | None, expected: float, depths, why: str) -> Row | None:
    if found is None:
        return None
    if abs(found - expected) < AUDIT_EXPONENT:
        return Row(name, quantity, found, (found, found), expected, "PASS", _SOURCE)
    grown = f"from {depths[0]} to {depths[1]} layers"
    message = f"{name}: {quantity} ∝ m_L^{found:z.2f} {grown}, expected m_L^{expected:g}: {why}"
    return Row(name, quantity, found, (found, found), expected, "FAIL", _SOURCE, message)
