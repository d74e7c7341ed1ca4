"""How what is known of a tensor follows from what is known of others: sums, products, powers.

A value is the sum of the chains of weights that a tensor is linear in; anything else that weights have gone into is
opaque: its coordinates are taken to be of size 1, times the factors met since. Values know nothing of operations;
forward_trace.py says which operation does what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from crystal.mup.chains import Chain, Ended, Factors, Loose, Product, Use, Vector, power_of, times, uses_in

COMPUTED = "a matrix computed from it"
LONGEST, MOST = 8, 512  # weights in a chain, and chains in a sum, beyond which they are not followed


@dataclass(frozen=True)
class Value:
    """What is known of a tensor: the chains whose sum it is, each with the factors met; the chain () is any other
    function of weights, and comes from the tensors `origins`. degree and source: of a homogeneous function of
    another value, such as a mean square."""

    terms: dict[Chain, tuple[Factors, ...]]
    origins: tuple[str, ...] = ()
    softmax: bool = False
    constant: bool = False
    made: bool = False  # of weights alone, as by a weight norm
    unknown: str = ""
    degree: float = 1.0
    source: Value | None = None

    @property
    def opaque(self) -> bool:
        return set(self.terms) == {()}

    @property
    def weight(self) -> bool:
        return all(chain and isinstance(chain[0], Use) and chain[0].kind == "weight" for chain in self.terms)

    def scale(self) -> Vector:
        """Of a value with one factor; of a sum, of its first term."""
        return times(*next(iter(self.terms.values()))[0])


class Algebra:
    """Values of tensors at several widths, and the chains that have ended."""

    def __init__(self, widths: int):
        self.ones: Vector = (1.0,) * widths
        self.ended: dict[Ended, None] = {}
        self.loose: dict[Loose, None] = {}

    def known(self, value: Value | None) -> Value | None:
        """A value that is a function of weights, or None."""
        return None if value is None or value.constant else value

    def end(self, value: Value | None, how: str, why: str = "") -> None:
        """This value is consumed: whatever multiplied its weights is now known."""
        value = self.known(value)
        if value is None:
            return
        if value.source is not None:
            self.end(value.source, how, why)
        if how == "norm" and len(value.terms) > 1 and not self._have_one_growth(value):
            how = "used"  # two or more terms in a norm share its scale: it does not care for their common one only
        for chain, alternatives in value.terms.items():
            for factors in alternatives:
                if chain:
                    self.ended.setdefault(Ended(chain, _rounded(factors), how, why))
                elif how != "norm":
                    self.loose.setdefault(Loose(value.origins, _rounded((times(*factors),))[0], how, why))

    def _have_one_growth(self, value: Value) -> bool:
        """Do all terms of a sum have met one factor that changes with width? (What none has met is no multiplier.)"""
        totals = {tuple(f"{f / t[0]:.9g}" for f in t) for fs in value.terms.values() for t in (times(*f) for f in fs)}
        return len(totals) == 1 and len(set(next(iter(totals)))) > 1

    def opaque(self, *values: Value | None, factor: Vector | None = None, softmax: bool = False) -> Value:
        names = dict.fromkeys(name for v in values if v is not None for name in names_of(v))
        unknown = next((v.unknown for v in values if v is not None and v.unknown), "")
        made = bool(values) and all(v is not None and (v.weight or v.made) for v in values)
        return Value({(): ((factor or self.ones,),)}, tuple(names)[-3:], softmax, made=made, unknown=unknown)

    def plain(self, value: Value | None) -> Value | None:
        """A value that is no homogeneous function of another any more: its source has been consumed."""
        if value is None or value.source is None:
            return value
        self.end(value.source, "used")
        own = power_of(value.source.scale(), -value.degree)  # what the source had met is known by now
        return self.opaque(value.source, factor=times(value.scale(), own))

    # ---- operations

    def scaled(self, value: Value, factor: Vector) -> Value:
        if all(f == 1 for f in factor):
            return value
        scaled = {c: tuple((*f[:-1], times(f[-1], factor)) for f in fs) for c, fs in value.terms.items()}
        return replace(value, terms=scaled)

    def product(self, a: Value, b: Value) -> Value:
        """Element by element."""
        for x, s in ((a, b), (b, a)):
            if s.source is not None and _key(s.source) == _key(x if x.source is None else x.source):
                degree = s.degree + (1.0 if x.source is None else x.degree)
                if abs(degree) < 1e-9:
                    self.end(x, "norm")
                    return self.opaque(x, factor=times(x.scale(), s.scale()))
        a, b = self.plain(a), self.plain(b)
        if b.weight or a.weight:
            w, x = (b, a) if b.weight else (a, b)
            return self.joined(x, used(w, "scale"))
        if a.opaque or b.opaque:
            x, gate = (b, a) if a.opaque else (a, b)
            gates = [times(*f) for f in gate.terms[()]]
            scaled = [self.scaled(x, g) for g in gates]
            result = replace(x, terms={c: tuple(f for s in scaled for f in s.terms[c]) for c in x.terms})
            names = tuple(dict.fromkeys((*a.origins, *b.origins)))[-3:] if x.opaque else x.origins
            return replace(result, origins=names, softmax=False, unknown=a.unknown or b.unknown)
        return self.joined_products(a, b, self.one_each())

    def one_each(self) -> tuple[int, ...]:
        return (1,) * len(self.ones)

    def joined(self, x: Value, w: Value) -> Value:
        """Chains of x, then those of w. A chain that grows too long ends."""
        if any(len(c) + 1 > LONGEST for c in x.terms):
            self.end(x, "used")
            x = self.opaque(x)
        terms: dict[Chain, tuple[Factors, ...]] = {}
        for cx, fx in x.terms.items():
            for cw, fw in w.terms.items():
                joined = tuple((*f[:-1], times(f[-1], g[0]), *g[1:]) for f in fx for g in fw)
                _also(terms, cx + cw, joined)
        return Value(terms, w.origins, unknown=x.unknown)

    def joined_products(self, a: Value, b: Value, length: tuple[int, ...]) -> Value:
        if len(a.terms) * len(b.terms) > MOST:
            for value in (a, b):
                self.end(value, "used")
            return self.opaque(a, b)
        if a.unknown or b.unknown:
            for value in (a, b):
                self.end(value, "unknown", a.unknown or b.unknown)
        terms: dict[Chain, tuple[Factors, ...]] = {}
        for ca, fa in a.terms.items():
            for cb, fb in b.terms.items():
                product = Product(ca, cb, (_last(ca, a), _last(cb, b)), length)
                found = tuple((self.ones, times(*f, *g)) for f in fa for g in fb)
                _also(terms, (product,), found)
        return Value(terms, unknown=a.unknown or b.unknown)

    def union(self, values: Sequence[Value | None]) -> Value | None:
        """Of a sum."""
        values = [v for v in map(self.known, values) if v is not None]
        if len(values) < 2:
            return values[0] if values else None
        if len({_key(v) for v in values}) == 1 and all(v.source is not None for v in values):
            return values[0]
        values = [self.plain(v) for v in values]
        if not all(v.weight for v in values):
            values = [used(v, "add") if v.weight else v for v in values]
        terms: dict[Chain, tuple[Factors, ...]] = {}
        for value in values:
            for chain, factors in value.terms.items():
                _also(terms, chain, factors)
        origins = tuple(dict.fromkeys(n for v in values for n in v.origins))[-3:]
        unknown = next((v.unknown for v in values if v.unknown), "")
        return Value(terms, origins, all(v.softmax for v in values), unknown=unknown)

    def homogeneous(self, value: Value, power: float, count: Vector) -> Value:
        """value to a power, then a sum of `count` of them."""
        source = value if value.source is None else value.source
        degree = (1.0 if value.source is None else value.degree) * power
        factor = times(power_of(value.scale(), power), count)
        made = source.weight or source.made
        return Value(
            {(): ((factor,),)}, names_of(source)[-3:], made=made, unknown=value.unknown, degree=degree, source=source
        )

    def contracted(self, a: Value | None, b: Value | None, shapes, transposed: bool, oriented: bool) -> Value | None:
        """a @ b (a @ b^T where transposed)."""
        a, b = self.plain(a), self.plain(b)
        length = tuple(s[0][-1] for s in shapes)
        out_b = tuple((s[1][0] if transposed else s[1][-1]) if len(s[1]) > 1 else 1 for s in shapes)
        out_a = tuple(s[0][-2] if len(s[0]) > 1 else 1 for s in shapes)
        if b is not None and b.weight:
            w = used(b, "matmul", length, out_b, oriented)
            # of two weights, a is one factor of a weight or a learned input
            return self.joined(a or self.opaque(), w)
        if a is not None and a.weight:
            return self.joined(b or self.opaque(), used(a, "matmul", length, out_a))
        a_known, b_known = self.known(a), self.known(b)
        if a_known is None or b_known is None:  # with a constant matrix
            return a_known or b_known
        for w, x in ((a, b), (b, a)):
            if w.made and not x.made:  # a matrix that is computed from weights: its scale is not theirs
                self.end(Value({(Use(name),): ((self.ones, self.ones),) for name in w.origins}), "unknown", COMPUTED)
                return self.opaque(x)
        for weights, x in ((a, b), (b, a)):
            if weights.softmax:  # a mean of rows of x
                return replace(self.scaled(x, weights.scale()), softmax=False, unknown=x.unknown or weights.unknown)
        return self.joined_products(a, b, length)


def _also(terms: dict[Chain, tuple[Factors, ...]], chain: Chain, factors: tuple[Factors, ...]) -> None:
    """Add a chain to a sum, or to one that is in it the factors that it has not met so far."""
    terms[chain] = tuple(dict.fromkeys((*terms.get(chain, ()), *factors)))


def used(
    value: Value, kind: str, fan_in: tuple[int, ...] = (), fan_out: tuple[int, ...] = (), oriented: bool = True
) -> Value:
    """A weight's chains with that use in place of "weight"."""
    terms = {}
    for chain, factors in value.terms.items():
        use = replace(chain[0], kind=kind, fan_in=fan_in, fan_out=fan_out, oriented=oriented)
        terms[(use, *chain[1:])] = factors
    return replace(value, terms=terms)


def products_only(value: Value) -> bool:
    return all(chain and isinstance(chain[-1], Product) for chain in value.terms)


def _key(value: Value) -> tuple:
    """Values of one key are the same function of weights up to scale."""
    own = (frozenset(value.terms), value.origins)
    return own if value.source is None else (own, value.degree, _key(value.source))


def names_of(value: Value) -> tuple[str, ...]:
    """The tensors that a value comes from most directly."""
    last = [uses_in(chain[-1:])[-1].tensor for chain in value.terms if uses_in(chain[-1:])]
    return tuple(dict.fromkeys((*value.origins, *last)))


def _last(chain: Chain, value: Value) -> str:
    uses = uses_in(chain[-1:])
    matrices = [u for u in uses_in(chain) if u.kind == "matmul"]
    if matrices and uses and uses[-1].kind == "scale":
        return matrices[-1].tensor
    return uses[-1].tensor if uses else ", ".join(value.origins)


def _rounded(factors: Factors) -> Factors:
    """Factors that differ by rounding are one: sqrt(c) * sqrt(c) is not quite c."""
    return tuple(tuple(math.nan if math.isnan(f) else float(f"{abs(f):.12g}") for f in v) for v in factors)
