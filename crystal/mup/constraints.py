"""What muP asks of a family of models, as sums of logarithms over one pair of widths.

A weight used as A*w, drawn with B and trained with lr C has a role in each of its uses, and Table 8 gives the role's
A0, B0, C0. With a, b, c the deviations log(A/A0), log(B/B0), log(C/C0) from base to the other width, a use is right
when a + b = 0 and a + c = 0 (abc-symmetry: Yang et al. 2022, Lemma J.1; under SGD c counts half). Where weights
multiply without anything between them that minds their scale, only their product does anything: then b = c for each
and sum(a) + sum(c) = 0 for the product. For q·k that sum is + log(d_head): the dot product of two vectors that
training correlates grows with their length ("Tensor Programs V", appendix B: a multiplier of 1/fan_in accompanies
every map from an infinite dimension to a finite one, which covers logits and attention scores alike).

QK-norm changes nothing in that: normed by their root mean square, q and k have coordinates of size 1 like any others
and the scores want 1/d_head; normed to length 1 they carry 1/sqrt(d_head) each, and want a constant (the cosine of
Henry et al. 2020, "Query-Key Normalization for Transformers").
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crystal.mup.chains import Ended, Product, Use, judgeable, products_in, uses_in
from crystal.mup.forward_trace import Trace
from crystal.mup.optimizers import OptimizerRule, halved, lr_power
from crystal.mup.rules import PARAMETRIZATIONS, Parametrization, Role, role_of_map
from crystal.mup.tolerances import AUDIT_EXPONENT
from crystal.mup.verdict import CheckError


def parametrization_named(name: str) -> Parametrization:
    """Raises CheckError for a name that is not in PARAMETRIZATIONS, with the nearest."""
    if name in PARAMETRIZATIONS:
        return PARAMETRIZATIONS[name]
    near = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), PARAMETRIZATIONS, 1, 0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise CheckError(f"parametrization: expected one of {', '.join(PARAMETRIZATIONS)}, got {name}{hint}")


@dataclass(frozen=True)
class Asked:
    """What Table 8 (or another parametrization) asks of one use, in logs: multiplier, init, lr."""

    role: Role
    forward: float
    init: float
    lr: float


@dataclass(frozen=True)
class Pair:
    """A pair of widths as places in a trace, with the ratio of the model's width and of every tensor's own."""

    base: int
    other: int
    rules: Parametrization
    log_m: float  # of the model's width
    own: Mapping[str, float]  # log of the ratio of a tensor's growing dimension; 0: it does not grow
    optimizer_rules: Mapping[str, OptimizerRule]

    def ratio(self, lengths: Sequence[float]) -> float:
        """log of how much a length grows between the two widths."""
        return math.log(lengths[self.other] / lengths[self.base]) if lengths and lengths[self.base] else 0.0

    def role(self, use: Use) -> Role | None:
        """Role of one use; None: nothing grows."""
        if use.kind in ("scale", "add", "weight"):
            return "vector" if self.own[use.tensor] else None
        return role_of_map(self.ratio(use.fan_in) != 0, self.ratio(use.fan_out) != 0)

    def asked(self, use: Use) -> Asked | None:
        return self.asked_of(use.tensor, self.role(use), self.ratio(use.fan_in), self.ratio(use.fan_out))

    def asked_of(self, tensor: str, role: Role | None, fan_in: float, fan_out: float) -> Asked | None:
        """fan_in, fan_out: logs of ratios. None where nothing grows."""
        if role is None:
            return None
        powers = self.rules.powers[role]
        r = self.log_m if role in ("hidden", "output") and not self.rules.own_fan_in else fan_in
        kind = self.optimizer_rules.get(tensor, "adam")
        lr = powers.lr * r
        if kind != "adam" and self.rules.name != "sp":
            lr = lr_power(kind, role, fan_in, fan_out if role != "vector" else self.own[tensor])
        return Asked(role, powers.forward * r, powers.init * r, lr)


@dataclass(frozen=True)
class Found:
    """Of one tensor: logs of the ratios of init (of each part that is not zero) and lr; None: not known."""

    inits: tuple[float, ...] | None
    lr: float | None


def close(value: float, log_m: float, parts: int = 1) -> bool:
    """Is this sum of exponents 0, up to the rounding of shapes?"""
    return abs(value) < AUDIT_EXPONENT * min(max(parts, 1), 3) * max(abs(log_m), 1e-9)


class Constraints:
    """The sums of every tensor and every product in a trace, for one pair of widths."""

    def __init__(self, trace: Trace, pair: Pair, found: Mapping[str, Found], attention_power: float | None):
        self.pair, self.found, self.attention_power = pair, found, attention_power
        self.ends: dict[str, list[Ended]] = {}
        self.products: list[Ended] = []
        for end in trace.ended:
            for tensor in {use.tensor for use in uses_in(end.chain)}:
                self.ends.setdefault(tensor, []).append(end)
            if any(isinstance(part, Product) for part in end.chain):
                self.products.append(end)

    def uses(self, tensor: str) -> list[Use]:
        """All uses of a tensor."""
        return [u for end in self.ends.get(tensor, ()) for u in uses_in(end.chain) if u.tensor == tensor]

    def explained_as(self, tensor: str, role: Role) -> str:
        """A role as `explain` takes it: of readouts, only those whose output the model puts out have logits."""
        inner = role == "output" and not any(end.logits for end in self.ends.get(tensor, ()))
        return "inner output" if inner else role

    def off(self, use: Use, asked: Asked) -> tuple[tuple[float, ...] | None, float | None]:
        """(deviations of init, deviation of lr as it counts) of one use."""
        found = self.found.get(use.tensor, Found(None, None))
        b = None if found.inits is None else tuple(x - asked.init for x in found.inits)
        kind = self.pair.optimizer_rules.get(use.tensor, "adam")
        return b, None if found.lr is None else (found.lr - asked.lr) * halved(kind)

    def shift(self, use: Use) -> float:
        """By how much init and lr both are off: what a multiplier has to make up for; 0 where they disagree."""
        asked = self.pair.asked(use)
        if asked is None or not self.consistent(use):
            return 0.0
        return self.off(use, asked)[1] or 0.0

    def consistent(self, use: Use) -> bool:
        """Are init and lr off by one factor, as far as they are known?"""
        asked = self.pair.asked(use)
        if asked is None:
            return True
        b, c = self.off(use, asked)
        return c is None or not b or all(close(x - c, self.pair.log_m) for x in b)

    def total(self, end: Ended) -> float:
        """log of how the product of all factors grows, less what Table 8 asks for; without lengths and shifts."""
        uses = uses_in(end.chain)
        asked = [self.pair.asked(use) for use in uses]
        return self.pair.ratio(end.total()) - sum(a.forward for a in asked if a is not None)

    def lengths(self, end: Ended) -> float:
        """log of how the dot products in a chain grow, by the power that is expected of them."""
        return sum(self.pair.ratio(p.length) for p in products_in(end)) * -(self.attention_power or 0.0)

    def sum(self, end: Ended) -> float:
        """What must be 0 for a product of several weights."""
        return self.total(end) + self.lengths(end) + sum(map(self.shift, uses_in(end.chain)))

    def holds(self, end: Ended) -> bool | None:
        """Is a product of several weights right? None: not judged here."""
        if not judgeable(end):
            return None
        if self.attention_power is None and products_in(end):
            return None
        return close(self.sum(end), self.pair.log_m, len(uses_in(end.chain)) + 1)

    def meant(self, end: Ended) -> bool:
        """Of a product that comes out wrong: is it nearer to right with the common factors of init and lr that its
        weights have? Then these are meant, and a multiplier is wrong."""
        plain = self.total(end) + self.lengths(end)
        return abs(self.sum(end)) < abs(plain) - 1e-9

    def right(self, tensor: str) -> bool | None:
        """Do all uses of a tensor follow the rule, by whichever of the equivalent forms? None: not all are known."""
        verdicts: list[bool] = []
        open_ = False
        for end in self.ends.get(tensor, ()):
            (use, *_), uses = [u for u in uses_in(end.chain) if u.tensor == tensor], uses_in(end.chain)
            asked = self.pair.asked(use)
            if asked is None:
                continue
            if not judgeable(end):
                open_ = True
                continue
            b, c = self.off(use, asked)
            if len(uses) == 1 and not products_in(end):
                if end.how == "norm":  # free in scale: only lr beside init counts
                    verdicts += [close(x - c, self.pair.log_m) for x in b or () if c is not None]
                    verdicts.append(c is not None or bool(b) is False or all(close(x, self.pair.log_m) for x in b))
                    continue
                a = self.pair.ratio(end.total()) - asked.forward
                verdicts += [close(a + x, self.pair.log_m, 2) for x in b or ()]
                verdicts += [] if c is None else [close(a + c, self.pair.log_m, 2)]
            else:
                held = self.holds(end)
                verdicts += [self.consistent(use)] + ([] if held is None else [held])
        return False if not all(verdicts) else None if open_ or not verdicts else True
