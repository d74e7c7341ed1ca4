"""Reads a model's forward multipliers off recordings of its forward pass, at several widths side by side.

muP's multipliers are constants that the code applies somewhere between a weight and whatever consumes its output:
embedding x alpha, logits / m, scores x 1/d, residual branch x m_L^-alpha. Every weight's output is followed through
views, casts, rotations, sums, products with constants and further weights up to the first operation that is not
homogeneous (a nonlinearity, a softmax, the loss) or does not care for scale (a norm). What it has met by then is a
*chain*: the weights whose product it is, and the scalars applied on the way. A chain of one weight gives that
weight's multiplier; where several weights multiply (q with k, low-rank factors, a gain and the matrix after it) only
the product of their scales means anything, and that is what is kept.

Widths are followed in lockstep, so that every use of a tensor is compared with the same use at another width.
An operation that is not in aten_ops.py ends a chain as "unknown": nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from crystal.mup import aten_ops as ops
from crystal.mup.forward_graph import Graph, Node, Ref, record

Vector = tuple[float, ...]  # one number for each width
Factors = tuple[Vector, ...]  # of a chain: applied before its first weight, and after each

LONGEST, MOST = 8, 512  # weights in a chain, and chains in a sum, beyond which they are not followed


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
        return _times(*self.factors)


@dataclass(frozen=True)
class _Value:
    """What is known of a tensor: the chains whose sum it is, each with the factors met; the chain () is any other
    function of weights, and comes from the tensors `origins`. degree and source: of a homogeneous function of
    another value, such as a mean square."""

    terms: dict[Chain, tuple[Factors, ...]]
    origins: tuple[str, ...] = ()
    softmax: bool = False
    constant: bool = False
    unknown: str = ""
    degree: float = 1.0
    source: _Value | None = None

    @property
    def opaque(self) -> bool:
        return set(self.terms) == {()}

    @property
    def weight(self) -> bool:
        return all(chain and isinstance(chain[0], Use) and chain[0].kind == "weight" for chain in self.terms)

    def scale(self) -> Vector:
        """Of a value with one factor; of a sum, of its first term."""
        return _times(*next(iter(self.terms.values()))[0])


@dataclass(frozen=True)
class Trace:
    """What a call does with every weight. ended: all chains; modules: name, key → chain → total factors where that
    module returns; unlike: why widths could not be followed side by side."""

    ended: tuple[Ended, ...]
    modules: dict[tuple[str, str], dict[Chain, Vector]] = field(default_factory=dict)
    unlike: str = ""


def follow(graphs: Sequence[Graph]) -> Trace:
    """Interpret the recordings of one call at several widths, which must run the same operations."""
    if unlike := _difference(graphs):
        return Trace((), {}, unlike)
    return _Reading(graphs).trace()


def _difference(graphs: Sequence[Graph]) -> str:
    first = graphs[0].nodes
    for graph in graphs[1:]:
        for a, b in zip(first, graph.nodes, strict=False):
            if a.op != b.op or [r.number for r in _refs(a)] != [r.number for r in _refs(b)]:
                return f"one width runs {a.op} where another runs {b.op}"
        if len(first) != len(graph.nodes):
            return f"one width runs {len(first)} operations, another {len(graph.nodes)}"
    return ""


class _Reading:
    """The state of one pass over the recordings; values are known by the numbers of the first one's tensors."""

    def __init__(self, graphs: Sequence[Graph]):
        self.graphs = graphs
        self.ones: Vector = (1.0,) * len(graphs)
        self.values: dict[int, _Value] = {}
        self.sizes: dict[int, int] = {}  # elements of a tensor, where a view may be only a part of it
        self.views: dict[tuple[int, int], _Value] = {}  # of parts that were written in place
        self.ended: dict[Ended, None] = {}

    def trace(self) -> Trace:
        for nodes in zip(*(g.nodes for g in self.graphs), strict=True):
            self.step(nodes)
        modules = {}
        for name, outputs in self.graphs[0].modules:
            for key, ref in outputs:
                if (value := self.value(ref)) is not None and value.source is None:
                    modules[name, key] = {chain: _times(*f[0]) for chain, f in value.terms.items()}
        for ref in self.graphs[0].results:
            self.end(self.value(ref), "used", "result")
        return Trace(tuple(self.ended), modules)

    # ---- values

    def value(self, ref: Any) -> _Value | None:
        if not isinstance(ref, Ref):
            return None
        if ref.parameter is not None:
            return _Value({(Use(ref.parameter),): ((self.ones, self.ones),)})
        return self.views.get((ref.number, ref.view), self.values.get(ref.number))

    def known(self, value: _Value | None) -> _Value | None:
        """A value that is a function of weights, or None."""
        return None if value is None or value.constant else value

    def number(self, given: Sequence[Any]) -> Vector:
        """Of a constant at each width; 1 where it is a tensor of several values, such as a rotation's cosines."""
        constant = self.value(given[0])
        if constant is not None and constant.constant:
            return constant.scale()
        found = [g.value if isinstance(g, Ref) else g for g in given]
        found = [1.0 if f is None or isinstance(f, complex) or f == 0 or math.isinf(f) else float(f) for f in found]
        return tuple(abs(f) for f in found)

    def end(self, value: _Value | None, how: str, why: str = "") -> None:
        """This value is consumed: whatever multiplied its weights is now known."""
        value = self.known(value)
        if value is None:
            return
        if value.source is not None:
            self.end(value.source, how, why)
        # two or more terms in a norm share its scale: it does not care for their common one only
        how = "used" if how == "norm" and len(value.terms) > 1 else how
        for chain, alternatives in value.terms.items():
            for factors in alternatives if chain else ():
                self.ended.setdefault(Ended(chain, _rounded(factors), how, why))

    def opaque(self, *values: _Value | None, factor: Vector | None = None, softmax: bool = False) -> _Value:
        names = dict.fromkeys(name for v in values if v is not None for name in _names(v))
        unknown = next((v.unknown for v in values if v is not None and v.unknown), "")
        return _Value({(): ((factor or self.ones,),)}, tuple(names)[-3:], softmax, unknown=unknown)

    def plain(self, value: _Value | None) -> _Value | None:
        """A value that is no homogeneous function of another any more: its source has been consumed."""
        if value is None or value.source is None:
            return value
        self.end(value.source, "used")
        return self.opaque(value.source, factor=value.scale())

    # ---- operations

    def step(self, nodes: tuple[Node, ...]) -> None:
        node = nodes[0]
        operands = [r for r in _refs(node)]
        if not any(self.value(r) is not None for r in operands):
            self._constant(nodes)
            return
        name = node.op.rstrip("_") if node.in_place else node.op
        outs = self.apply(name, nodes)
        outs = outs if isinstance(outs, list) else [outs] * len(node.outs)
        for ref, out in zip(node.outs, outs, strict=False):
            self.put(ref, out, node.in_place)

    def put(self, ref: Ref, value: _Value | None, in_place: bool) -> None:
        if value is not None and len(value.terms) > MOST:
            self.end(value, "used")
            value = self.opaque(value)
        size = math.prod(ref.shape)
        if in_place and size < self.sizes.get(ref.number, 0):  # a part of it was written
            if value is not None:
                self.views[ref.number, ref.view] = value
            value = self.union([self.values.get(ref.number), value])
        else:
            self.views = {key: old for key, old in self.views.items() if key[0] != ref.number}
        self.sizes[ref.number] = max(size, self.sizes.get(ref.number, 0))
        if value is None:
            self.values.pop(ref.number, None)
        else:
            self.values[ref.number] = value

    def _constant(self, nodes: tuple[Node, ...]) -> None:
        """Of data and constants only what scales them is kept: images / m is a multiplier of the first layer."""
        node = nodes[0]
        name = node.op.rstrip("_")
        if name not in ("mul", "div") or not node.outs or not node.outs[0].floating:
            return
        if math.prod(node.outs[0].shape) == 1:
            return  # its value is known, or is known not to be
        factors = [self.number([_arg(n, i) for n in nodes]) for i in (0, 1)]
        factor = _times(factors[0], factors[1] if name == "mul" else _power(factors[1], -1))
        if len(set(factor)) > 1 or any(map(math.isnan, factor)):
            self.values[node.outs[0].number] = _Value({(): ((factor,),)}, constant=True)

    def apply(self, name: str, nodes: tuple[Node, ...]) -> Any:
        node = nodes[0]
        first = self.value(_arg(node, 0))
        if name in ops.FORGETS:
            return None
        if name in ("mul", "div", "multiply", "divide", "true_divide", "addcmul", "addcdiv"):
            return self._scaled(name, nodes)
        if name in ops.MATMULS:
            return self._matmul(name, nodes)
        if "scaled_dot_product" in name or name in _ATTENTION:
            return self._attention(nodes)
        if name in ("flex_scores", "flex_values"):
            return self._flex(name, nodes)
        if name in ops.CONVOLUTIONS:
            return self._convolution(nodes)
        if name in ops.LOOKUPS or (name in _INDEXING and first is not None and first.weight and len(first.terms) == 1):
            return self._lookup(nodes)
        if name in ops.NORMS:
            return self._norm(name, nodes)
        if name in _POWERS or name in ("pow", "linalg_vector_norm", "norm", "var", "std", "var_mean", "std_mean"):
            return self._power_of(name, nodes)
        if name == "sum" or name in ops.AVERAGES:
            return self._sum(name, nodes)
        if name in ops.SAME:
            return self.value(_arg(node, 1)) if name == "copy" else next(filter(None, map(self.value, _refs(node))))
        if name in ops.SUMS:
            return self._added(name, nodes)
        if name.startswith("clamp_min") and first is not None and first.source is not None:
            return first  # the eps of a norm
        inputs = [self.value(r) for r in _refs(node)]
        if name in ops.NONLINEAR or name in ops.SOFTMAX or name in ops.LOG_SOFTMAX:
            for value in inputs:
                self.end(value, "used", name if name in ops.LOG_SOFTMAX else "")
            return self.opaque(*map(self.known, inputs), softmax=name in ops.SOFTMAX)
        if not any(ref.floating for ref in node.outs):
            return None
        for value in inputs:
            self.end(value, "unknown", name)
        return replace(self.opaque(*map(self.known, inputs)), unknown=name)

    def _scaled(self, name: str, nodes: tuple[Node, ...]) -> _Value | None:
        node = nodes[0]
        if name.startswith("addc"):  # addcmul(x, a, b, value): x + value * a * b
            product = self._times(self.value(node.args[1]), self.value(node.args[2]), name == "addcdiv", nodes, (1, 2))
            return self.union([self.value(node.args[0]), product])
        if _same(node.args[0], _arg(node, 1)):
            return self._homogeneous(self.value(node.args[0]), 2.0 if name == "mul" else 0.0, self.ones)
        return self._times(self.value(_arg(node, 0)), self.value(_arg(node, 1)), "div" in name, nodes, (0, 1))

    def _times(self, a, b, divided: bool, nodes, places) -> _Value | None:
        a_known, b_known = self.known(a), self.known(b)
        if a_known is None and b_known is None:
            return None
        if b_known is None or a_known is None:  # by a constant
            if b_known is None:
                factor = self.number([_arg(n, places[1]) for n in nodes])
                return self.times(a_known, _power(factor, -1) if divided else factor)
            factor = self.number([_arg(n, places[0]) for n in nodes])
            if divided:
                b_known = self._homogeneous(b_known, -1.0, self.ones)
            return self.times(b_known, factor)
        if divided:
            if a_known.source is None and b_known.source is None and _products(a_known) and _products(b_known):
                return self.opaque(a_known, b_known)  # a weighted mean: the scale of its weights cancels
            b_known = self._homogeneous(b_known, -1.0, self.ones)
        return self.product(a_known, b_known)

    def times(self, value: _Value, factor: Vector) -> _Value:
        if all(f == 1 for f in factor):
            return value
        scaled = {c: tuple((*f[:-1], _times(f[-1], factor)) for f in fs) for c, fs in value.terms.items()}
        return replace(value, terms=scaled)

    def product(self, a: _Value, b: _Value) -> _Value:
        """Element by element."""
        for x, s in ((a, b), (b, a)):
            if s.source is not None and _key(s.source) == _key(x if x.source is None else x.source):
                degree = s.degree + (1.0 if x.source is None else x.degree)
                if abs(degree) < 1e-9:
                    self.end(x, "norm")
                    return self.opaque(x, factor=_times(x.scale(), s.scale()))
        a, b = self.plain(a), self.plain(b)
        if b.weight or a.weight:
            w, x = (b, a) if b.weight else (a, b)
            return self.joined(x, _used(w, "scale"))
        if a.opaque or b.opaque:
            x, gate = (b, a) if a.opaque else (a, b)
            result = self.times(x, gate.scale())
            names = tuple(dict.fromkeys((*a.origins, *b.origins)))[-3:] if x.opaque else x.origins
            return replace(result, origins=names, softmax=False, unknown=a.unknown or b.unknown)
        return self.joined_products(a, b, self.one_each())

    def one_each(self) -> tuple[int, ...]:
        return (1,) * len(self.graphs)

    def joined(self, x: _Value, w: _Value) -> _Value:
        """Chains of x, then those of w. A chain that grows too long ends."""
        if any(len(c) + 1 > LONGEST for c in x.terms):
            self.end(x, "used")
            x = self.opaque(x)
        terms: dict[Chain, tuple[Factors, ...]] = {}
        for cx, fx in x.terms.items():
            for cw, fw in w.terms.items():
                joined = tuple((*f[:-1], _times(f[-1], g[0]), *g[1:]) for f in fx for g in fw)
                terms[cx + cw] = tuple(dict.fromkeys((*terms.get(cx + cw, ()), *joined)))
        return _Value(terms, w.origins, unknown=x.unknown if x.unknown else "")

    def joined_products(self, a: _Value, b: _Value, length: tuple[int, ...]) -> _Value:
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
                found = tuple((self.ones, _times(*f, *g)) for f in fa for g in fb)
                terms[(product,)] = tuple(dict.fromkeys((*terms.get((product,), ()), *found)))
        return _Value(terms, unknown=a.unknown or b.unknown)

    def union(self, values: Sequence[_Value | None]) -> _Value | None:
        """Of a sum."""
        values = [v for v in map(self.known, values) if v is not None]
        if len(values) < 2:
            return values[0] if values else None
        if len({_key(v) for v in values}) == 1 and all(v.source is not None for v in values):
            return values[0]
        values = [self.plain(v) for v in values]
        if not all(v.weight for v in values):
            values = [_used(v, "add") if v.weight else v for v in values]
        terms: dict[Chain, tuple[Factors, ...]] = {}
        for value in values:
            for chain, factors in value.terms.items():
                terms[chain] = tuple(dict.fromkeys((*terms.get(chain, ()), *factors)))
        origins = tuple(dict.fromkeys(n for v in values for n in v.origins))[-3:]
        unknown = next((v.unknown for v in values if v.unknown), "")
        return _Value(terms, origins, all(v.softmax for v in values), unknown=unknown)

    def _added(self, name: str, nodes: tuple[Node, ...]) -> _Value | None:
        node = nodes[0]
        values = [self.value(r) for r in _refs(node)]
        alpha = [n.kwargs.get("alpha", 1) for n in nodes]
        if name in ("add", "sub") and any(a != 1 for a in alpha) and self.known(self.value(node.args[1])):
            values = [self.value(node.args[0]), self.times(values[-1], self.number(alpha))]
        return self.union(values)

    def _homogeneous(self, value: _Value, power: float, count: Vector) -> _Value:
        """value to a power, then a sum of `count` of them."""
        source = value if value.source is None else value.source
        degree = (1.0 if value.source is None else value.degree) * power
        factor = _times(_power(value.scale(), power), count)
        return _Value({(): ((factor,),)}, _names(source)[-3:], unknown=value.unknown, degree=degree, source=source)

    def _power_of(self, name: str, nodes: tuple[Node, ...]) -> Any:
        node = nodes[0]
        value = self.known(self.value(node.args[0]))
        if value is None:  # a number to the power of a weight
            self.end(self.value(_arg(node, 1)), "used")
            return self.opaque(self.value(_arg(node, 1)))
        if value.weight and name not in ("linalg_vector_norm", "norm"):
            self.end(_used(value, "scale"), "used")
            return self.opaque(value)
        counts = self._counts(nodes)
        match name:
            case "pow":
                power = _arg(node, 1)
                if isinstance(power, Ref):
                    self.end(value, "used")
                    return self.opaque(value)
                return self._homogeneous(value, float(power), self.ones)
            case "linalg_vector_norm" | "norm":
                order = _arg(node, 1)
                order = 2.0 if order is None or isinstance(order, str | Ref) else float(order)
                count = self.ones if math.isinf(order) or order == 0 else _power(counts, 1 / order)
                return self._homogeneous(value, 1.0, count)
            case "var" | "std":
                return self._homogeneous(value, 2.0 if name == "var" else 1.0, self.ones)
            case "var_mean" | "std_mean":
                return [self._homogeneous(value, 2.0 if name == "var_mean" else 1.0, self.ones), value]
        return self._homogeneous(value, _POWERS[name], self.ones)

    def _counts(self, nodes: tuple[Node, ...]) -> Vector:
        return tuple(math.prod(n.args[0].shape) / max(math.prod(n.outs[0].shape), 1) for n in nodes)

    def _sum(self, name: str, nodes: tuple[Node, ...]) -> _Value | None:
        value = self.value(nodes[0].args[0])
        counts = self._counts(nodes)
        grows = len(set(counts)) > 1
        if value is None or not grows:
            return value
        lengths = tuple(round(c) for c in counts)
        back = self.ones if name == "sum" else _power(counts, -1)
        if value.source is not None or value.opaque:
            return self.times(value, counts) if name == "sum" else value
        terms: dict[Chain, tuple[Factors, ...]] = {}
        for chain, factors in value.terms.items():
            last = chain[-1]
            extra = counts
            if isinstance(last, Use) and last.kind == "scale":  # (x * w).sum(-1) is a product with w
                chain, extra = (*chain[:-1], replace(last, kind="matmul", fan_in=lengths)), self.ones
            elif isinstance(last, Product) and set(last.length) == {1}:  # (q * k).sum(-1)
                chain, extra = (*chain[:-1], replace(last, length=lengths)), self.ones
            if name != "sum" and extra == counts:  # a mean of like things is as large as they are
                terms[chain] = factors
            else:
                terms[chain] = tuple((*f[:-1], _times(f[-1], extra, back)) for f in factors)
        return replace(value, terms=terms)

    def _matmul(self, name: str, nodes: tuple[Node, ...]) -> _Value | None:
        added = name.startswith(("addmm", "baddbmm", "addbmm", "addmv", "_addmm"))
        places = (1, 2) if added else (0, 1)
        a, b = (self.value(nodes[0].args[i]) for i in places)
        shapes = [[n.args[i].shape for i in places] for n in nodes]
        transposed = name == "linear"
        zeros = [isinstance(r, Ref) and r.value == 0 for r in (nodes[0].args[i] for i in places)]
        if any(zeros) and not any(v is not None and v.weight for v in (a, b)):
            a = b = None  # such as a state before its first token
        weight = nodes[0].args[places[1]]
        oriented = transposed or len(weight.shape) != 2 or weight.strides[0] == 1
        result = self.contracted(a, b, shapes, transposed, oriented)
        if result is not None:
            result = self.times(result, self.number([n.kwargs.get("alpha", _arg(n, 4, 1)) for n in nodes] if added
                                                    else [1] * len(nodes)))  # fmt: skip
        bias = nodes[0].args[0] if added else _arg(nodes[0], 2) if transposed else None
        bias = self.value(bias)
        if bias is not None and added:
            bias = self.times(bias, self.number([n.kwargs.get("beta", _arg(n, 3, 1)) for n in nodes]))
        if bias is not None and bias.weight:
            bias = _used(bias, "add")
        return self.union([result, bias])

    def contracted(self, a: _Value | None, b: _Value | None, shapes, transposed: bool, oriented: bool) -> _Value | None:
        """a @ b (a @ b^T where transposed)."""
        a, b = self.plain(a), self.plain(b)
        length = tuple(s[0][-1] for s in shapes)
        out_b = tuple((s[1][0] if transposed else s[1][-1]) if len(s[1]) > 1 else 1 for s in shapes)
        out_a = tuple(s[0][-2] if len(s[0]) > 1 else 1 for s in shapes)
        if b is not None and b.weight:
            used = _used(b, "matmul", length, out_b, oriented)
            if a is not None and a.weight:  # of two weights: one factor of a weight, or a learned input
                return self.joined(a, used)
            return self.joined(a or _Value({(): ((self.ones,),)}), used)
        if a is not None and a.weight:
            return self.joined(b or _Value({(): ((self.ones,),)}), _used(a, "matmul", length, out_a))
        a_known, b_known = self.known(a), self.known(b)
        if a_known is None or b_known is None:  # with a constant matrix
            return a_known or b_known
        for weights, x in ((a, b), (b, a)):
            if weights.softmax:  # a mean of rows of x
                return replace(self.times(x, weights.scale()), softmax=False, unknown=x.unknown or weights.unknown)
        return self.joined_products(a, b, length)

    def _attention(self, nodes: tuple[Node, ...]) -> Any:
        node = nodes[0]
        query, key, value = (self.value(_arg(node, i)) for i in range(3))
        given = [n.kwargs.get("scale", self._scale_argument(n)) for n in nodes]
        lengths = tuple(n.args[0].shape[-1] for n in nodes)
        scale = [1 / math.sqrt(d) if s is None else s for s, d in zip(given, lengths, strict=True)]
        return [self._attend(query, key, value, lengths, self.number(scale))]

    @staticmethod
    def _scale_argument(node: Node) -> float | None:
        return next((a for a in node.args[6:] if isinstance(a, float)), None) if node.op == "_varlen_attn" else None

    def _attend(self, query, key, value, lengths, scale: Vector) -> _Value | None:
        query, key = self.plain(self.known(query)), self.plain(self.known(key))
        if query is not None and key is not None:
            self.end(self.times(self.joined_products(query, key, lengths), scale), "used")
        else:
            self.end(query or key, "used")
        value = self.plain(self.known(value))
        return self.opaque(query, key) if value is None else replace(value, softmax=False)

    def _flex(self, name: str, nodes: tuple[Node, ...]) -> _Value | None:
        a, b = (self.plain(self.known(self.value(r))) for r in nodes[0].args[:2])
        if name == "flex_values":
            self.end(a, "used")
            return b
        lengths = tuple(n.args[0].shape[-1] for n in nodes)
        scale = self.number([1 / math.sqrt(n.args[0].shape[-1]) if n.args[2] is None else n.args[2] for n in nodes])
        if a is None or b is None:
            return a or b
        return self.times(self.joined_products(a, b, lengths), scale)

    def _convolution(self, nodes: tuple[Node, ...]) -> Any:
        node = nodes[0]
        x, w, bias = (self.plain(self.value(_arg(node, i))) for i in range(3))
        transposed = node.op == "convolution" and bool(_arg(node, 6))
        if w is None or not w.weight:
            for value in (x, w):
                self.end(value, "unknown", node.op)
            return replace(self.opaque(x, w), unknown=node.op)
        shapes = [n.args[1].shape for n in nodes]
        fan_in = tuple((s[0] if transposed else s[1]) * math.prod(s[2:]) for s in shapes)
        fan_out = tuple(s[1] if transposed else s[0] for s in shapes)
        result = self.joined(x or _Value({(): ((self.ones,),)}), _used(w, "matmul", fan_in, fan_out))
        return [self.union([result, _used(bias, "add") if bias is not None and bias.weight else bias])]

    def _lookup(self, nodes: tuple[Node, ...]) -> Any:
        weight = self.value(nodes[0].args[0])
        if weight is None or not weight.weight:
            return [weight]
        fan_out = tuple(n.args[0].shape[-1] for n in nodes)
        return [_used(weight, "lookup", self.one_each(), fan_out)] * len(nodes[0].outs)

    def _norm(self, name: str, nodes: tuple[Node, ...]) -> Any:
        node = nodes[0]
        at, weight_at, bias_at = ops.NORMS[name]
        x = self.plain(self.known(self.value(_arg(node, at))))
        self.end(x, "norm")
        result = self.opaque(x)
        weight = self.value(_arg(node, weight_at))
        if weight is not None and weight.weight:
            result = self.joined(result, _used(weight, "scale"))
        bias = None if bias_at is None else self.value(_arg(node, bias_at))
        return [self.union([result, _used(bias, "add") if bias is not None and bias.weight else bias])]


_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "abs": 1.0}
_INDEXING = ("index", "index_select", "gather")
_ATTENTION = ("_varlen_attn", "_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward")


def trace_multipliers(model: nn.Module, call: Callable[[nn.Module], Any]) -> Multipliers:
    """What one forward pass of one model applies. call: runs it, and makes its own inputs, on the model's device."""
    import torch

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with device:
        return multipliers(follow([record(model, call)]))


@dataclass(frozen=True)
class Multipliers:
    """outputs: (tensor, use) → factors of its output, use being `lookup` (an embedding) or `matmul`; scores: (query's
    tensor, key's tensor) → (factors, length of the dot products). More than one factor: applied differently in places.
    """

    outputs: dict[tuple[str, str], frozenset[float]]
    scores: dict[tuple[str, str], tuple[frozenset[float], int]]


def multipliers(trace: Trace, width: int = 0) -> Multipliers:
    """At one of the widths that were traced."""
    outputs: dict[tuple[str, str], set[float]] = {}
    scores: dict[tuple[str, str], tuple[set[float], int]] = {}
    for end in trace.ended:
        for use, factor in applied(end):
            if use.kind in ("lookup", "matmul"):
                outputs.setdefault((use.tensor, use.kind), set()).add(factor[width])
        for part in end.chain:
            if isinstance(part, Product) and _is_scores(part):
                found = scores.setdefault(part.names, (set(), part.length[width]))
                found[0].add(end.total()[width])
    return Multipliers(
        {key: frozenset(found) for key, found in outputs.items()},
        {key: (frozenset(found), length) for key, (found, length) in scores.items()},
    )


def applied(end: Ended) -> list[tuple[Use, Vector]]:
    """Each use in a chain with the factor next to it: after it, and for the first, before it too."""
    found = []
    for place, part in enumerate(end.chain):
        if isinstance(part, Use):
            factor = end.factors[place + 1]
            found.append((part, _times(end.factors[0], factor) if place == 0 else factor))
    return found


def uses_in(chain: Chain) -> list[Use]:
    """All uses of a chain, those inside products too."""
    return [
        use
        for part in chain
        for use in ([part] if isinstance(part, Use) else uses_in(part.left) + uses_in(part.right))
    ]  # fmt: skip


def _is_scores(product: Product) -> bool:
    """Is it a dot product of two projections (and not of their biases)?"""
    sides = [side[-1].kind if side and isinstance(side[-1], Use) else "matmul" for side in (product.left, product.right)]
    return max(product.length) > 1 and set(sides) <= {"matmul", "scale", "lookup"}


def _used(
    value: _Value, kind: str, fan_in: tuple[int, ...] = (), fan_out: tuple[int, ...] = (), oriented: bool = True
) -> _Value:
    """A weight's chains with that use in place of "weight"."""
    terms = {}
    for chain, factors in value.terms.items():
        use = replace(chain[0], kind=kind, fan_in=fan_in, fan_out=fan_out, oriented=oriented)
        terms[(use, *chain[1:])] = factors
    return replace(value, terms=terms)


def _products(value: _Value) -> bool:
    return all(chain and isinstance(chain[-1], Product) for chain in value.terms)


def _key(value: _Value) -> tuple:
    """Values of one key are the same function of weights up to scale."""
    own = (frozenset(value.terms), value.origins)
    return own if value.source is None else (own, value.degree, _key(value.source))


def _names(value: _Value) -> tuple[str, ...]:
    """The tensors that a value comes from most directly."""
    last = [uses_in(chain[-1:])[-1].tensor for chain in value.terms if uses_in(chain[-1:])]
    return tuple(dict.fromkeys((*value.origins, *last)))


def _last(chain: Chain, value: _Value) -> str:
    uses = uses_in(chain[-1:])
    matrices = [u for u in uses_in(chain) if u.kind == "matmul"]
    if matrices and uses and uses[-1].kind == "scale":
        return matrices[-1].tensor
    return uses[-1].tensor if uses else ", ".join(value.origins)


def _refs(node: Node) -> list[Ref]:
    def within(value: Any) -> list[Ref]:
        if isinstance(value, Ref):
            return [value]
        return [r for v in value for r in within(v)] if isinstance(value, tuple) else []

    return within((node.args, tuple(node.kwargs.values())))


def _arg(node: Node, place: int | None, default: Any = None) -> Any:
    return node.args[place] if place is not None and place < len(node.args) else default


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Ref) and isinstance(b, Ref) and a.number == b.number


def _times(*vectors: Vector) -> Vector:
    return tuple(math.prod(column) for column in zip(*vectors, strict=True))


def _power(vector: Vector, power: float) -> Vector:
    return tuple(v**power if v else math.nan for v in vector)


def _rounded(factors: Factors) -> Factors:
    """Factors that differ by rounding are one: sqrt(c) * sqrt(c) is not quite c."""
    return tuple(tuple(math.nan if math.isnan(f) else float(f"{abs(f):.12g}") for f in v) for v in factors)
