"""The muP rules: how each role's init, learning rate, weight decay, eps and forward multiplier scale with width.

With m = width / base width (of a tensor's own fan-in, or one global m in Cerebras' form) and m_L = depth / base
depth, a role's quantities scale as powers of m and m_L:

| role       | dims that grow     | init sigma | lr     | forward        |
|------------|--------------------|------------|--------|----------------|
| embedding  | fan_out            | 1          | 1      | x alpha_in     |
| vector     | the only one       | 1          | 1      |                |
| hidden     | fan_in and fan_out | m^-1/2     | m^-1   |                |
| output     | fan_in             | 1          | 1      | x alpha_out/m  |

(Yang et al. 2022, "Tensor Programs V", Table 8: the form that allows a tied embedding, for Adam.) Under `sp`
every power is 0. `completep` adds depth (Dey et al. 2025, Table 1, alpha in [1/2, 1]): residual branches
x m_L^-alpha, lr of everything inside blocks x m_L^(alpha-1), their eps x m^-1 m_L^-alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["embedding", "hidden", "output", "vector"]


def role_of_map(fan_in_grows: bool, fan_out_grows: bool) -> Role | None:
    """Role of a map, by which of its sides grow with width; None: neither does."""
    if fan_in_grows:
        return "hidden" if fan_out_grows else "output"
    return "embedding" if fan_out_grows else None


@dataclass(frozen=True)
class Powers:
    """Exponents of m for one role."""

    init: float = 0.0
    lr: float = 0.0
    forward: float = 0.0


@dataclass(frozen=True)
class Parametrization:
    """One set of rules."""

    name: str
    source: str
    powers: dict[Role, Powers]
    own_fan_in: bool = True  # False: one m for every tensor, the ratio of d_model
    depth: bool = False  # CompleteP's m_L rules


_SP = {"embedding": Powers(), "hidden": Powers(), "output": Powers(), "vector": Powers()}
_MUP = _SP | {"hidden": Powers(init=-0.5, lr=-1.0), "output": Powers(forward=-1.0)}

PARAMETRIZATIONS = {
    p.name: p
    for p in (
        Parametrization("sp", "standard parametrization", _SP),
        Parametrization("mup", "Tensor Programs V, Table 8", _MUP),
        Parametrization("crystalcoder", "Cerebras form, phase params", _MUP, own_fan_in=False),
        Parametrization("completep", "CompleteP, Table 1", _MUP, depth=True),
    )
}


@dataclass(frozen=True)
class Tuning:
    """What was tuned at the base width (and depth), and the switches on which published recipes differ."""

    init_std: float = 0.02  # parent-normal sigma
    init_truncate: float | None = None  # cut at this many sigmas
    embedding_multiplier: float = 1.0
    output_alpha: float = 1.0
    residual_init_2l: bool = False  # GPT-2's 1/sqrt(2 n_layers) on residual-out matrices
    depth_alpha: float = 1.0
    weight_decay: float = 0.1
    decay_vectors: bool = False  # Amber decays biases and norms too
    independent_decay: bool = False  # lambda x m where lr is / m, so that lr * lambda stays
    eps: float = 1e-8
