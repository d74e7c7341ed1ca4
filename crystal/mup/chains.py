"""Chains: which weights a tensor is the product of, and the factors that were applied on the way.

What a recorded forward pass does to weights is read into these (forward_trace.py), and the rules of muP are sums over
them (constraints.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Vector = tuple[float, ...]  # one number for each width
Factors = tuple[Vector, ...]  # of a chain: applied before its first weight, and after each


@dataclass(frozen=True)
class Use:
    """One use of a tensor. kind: lookup | matmul | scale (a factor, by element) | add | weight (not used yet).

    fan_in: length of the sum over its inputs, fan_out: number of its outputs, at each width. oriented: does the code
    say which is which, as an einsum does and a weight that is transposed as in a Linear, and a bare x @ w does not?
    """

    tensor: str
    kind: str = "weight"
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    oriented: bool = True


@dataclass(frozen=True)
class Product:
    """Two functions of weights multiplied: the scores q·k, or by element (length 1).

    left, right: their chains, or where they are no longer linear in a weight, () and the tensors they come from.
    """

    left: Chain
    right: Chain
    names: tuple[str, str]
    length: tuple[int, ...]


Chain = tuple["Use | Product", ...]


@dataclass(frozen=True)
class Ended:
    """A chain where it ends. how: used | norm (which does not care for scale) | unknown. why: the operation that is
    unknown; of what is used, `result` or the operation where these are a model's outputs."""

    chain: Chain
    factors: Factors
    how: str
    why: str = ""

    @property
    def logits(self) -> bool:
        """Does the model put this out?"""
        return self.how == "used" and bool(self.why)

    def total(self) -> Vector:
        return times(*self.factors)


@dataclass(frozen=True)
class Loose:
    """An activation (what comes from `names` through something nonlinear) whose scale counts where it goes, with the
    factor that it had met. how and why: as of `Ended`."""

    names: tuple[str, ...]
    factor: Vector
    how: str
    why: str = ""


def applied(end: Ended) -> list[tuple[Use, Vector]]:
    """Each use in a chain with the factor next to it: after it, and for the first, before it too."""
    found = []
    for place, part in enumerate(end.chain):
        if isinstance(part, Use):
            factor = end.factors[place + 1]
            found.append((part, times(end.factors[0], factor) if place == 0 else factor))
    return found


def uses_in(chain: Chain) -> list[Use]:
    """All uses of a chain, those inside products too."""
    return [
        use
        for part in chain
        for use in ([part] if isinstance(part, Use) else uses_in(part.left) + uses_in(part.right))
    ]  # fmt: skip


def judgeable(end: Ended) -> bool:
    """Is it known where a chain ends, and with which factor?"""
    return end.how != "unknown" and not any(map(math.isnan, end.total()))


def products_within(chain: Chain) -> list[Product]:
    """All products of two functions of weights in a chain, those inside others too."""
    found = []
    for part in chain:
        if isinstance(part, Product):
            found += [part, *products_within(part.left), *products_within(part.right)]
    return found


def products_in(end: Ended) -> list[Product]:
    """All products of two functions of weights in a chain that has ended."""
    return products_within(end.chain)


def is_scores(product: Product) -> bool:
    """Is it a dot product of two projections (and not of their biases)?"""
    sides = [
        side[-1].kind if side and isinstance(side[-1], Use) else "matmul" for side in (product.left, product.right)
    ]
    return max(product.length) > 1 and set(sides) <= {"matmul", "scale", "lookup"}


def times(*vectors: Vector) -> Vector:
    return tuple(math.prod(column) for column in zip(*vectors, strict=True))


def power_of(vector: Vector, power: float) -> Vector:
    return tuple(v**power if v else math.nan for v in vector)
