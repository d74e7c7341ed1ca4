"""What each recorded operation does to what is known of its operands, at several widths side by side.

See forward_trace.py for what this is for, chain_values.py for the sums and products themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import crystal.mup.aten_ops as ops
from crystal.mup.chain_values import MOST, Algebra, Value, products_only, used
from crystal.mup.chains import Chain, Ended, Factors, Loose, Product, Use, Vector, power_of, times
from crystal.mup.forward_graph import Graph, Node, Ref


class Reading:
    """The state of one pass over the recordings; values are known by the numbers of the first one's tensors."""

    def __init__(self, graphs: Sequence[Graph]):
        self.graphs = graphs
        self.algebra = Algebra(len(graphs))
        self.values: dict[int, Value] = {}
        self.sizes: dict[int, int] = {}  # elements of a tensor, where a view may be only a part of it
        self.views: dict[tuple[int, int], Value] = {}  # of parts that were written in place

    def read(self) -> tuple[tuple[Ended, ...], tuple[Loose, ...], dict[tuple[str, str], dict[Chain, Vector]]]:
        """(chains that ended; activations that were scaled; name, key of what a module returns → chain → factors)."""
        for nodes in zip(*(g.nodes for g in self.graphs), strict=True):
            self.step(nodes)
        modules = {}
        for name, outputs in self.graphs[0].modules:
            for key, ref in outputs:
                if (value := self.value(ref)) is not None and value.source is None:
                    modules[name, key] = {chain: times(*f[0]) for chain, f in value.terms.items()}
        for ref in self.graphs[0].results:
            value = self.algebra.plain(self.value(ref))
            one = value is not None and value.opaque and len(value.terms[()]) == 1
            if not (one and math.prod(ref.shape) == 1):  # Adam's kind does not mind the scale of a loss
                self.algebra.end(value, "used", "result")
        return tuple(self.algebra.ended), tuple(self.algebra.loose), modules

    # ---- values

    def value(self, ref: Any) -> Value | None:
        if not isinstance(ref, Ref):
            return None
        if ref.parameter is not None:
            return Value({(Use(ref.parameter),): ((self.algebra.ones, self.algebra.ones),)})
        return self.views.get((ref.number, ref.view), self.values.get(ref.number))

    def number(self, given: Sequence[Any]) -> Vector:
        """Of a constant at each width; 1 where it is a tensor of several values, such as a rotation's cosines."""
        constant = self.value(given[0])
        if constant is not None and constant.constant:
            return constant.scale()
        if all(isinstance(g, Ref) and g.value is None and g.size for g in given):
            sizes = [g.size for g in given]  # of several values: a table of rotations keeps its size, a scale does not
            return tuple(sizes) if max(sizes) > SAME_SIZE * min(sizes) else self.algebra.ones
        found = [abs(g.value if isinstance(g, Ref) else g) if not _no_number(g) else 1.0 for g in given]
        return tuple(1.0 if f == 0 or math.isinf(f) else float(f) for f in found)

    def step(self, nodes: tuple[Node, ...]) -> None:
        node = nodes[0]
        if not any(self.value(r) is not None for r in node.refs):
            self._constant(nodes)
            return
        name = node.op.rstrip("_") if node.in_place else node.op
        outs = self.apply(name, nodes)
        outs = outs if isinstance(outs, list) else [outs] * len(node.outs)
        for ref, out in zip(node.outs, outs, strict=False):
            self.put(ref, out, node.in_place)

    def put(self, ref: Ref, value: Value | None, in_place: bool) -> None:
        if value is not None and len(value.terms) > MOST:
            self.algebra.end(value, "used")
            value = self.algebra.opaque(value)
        size = math.prod(ref.shape)
        if in_place and size < self.sizes.get(ref.number, 0):  # a part of it was written
            if value is not None:
                self.views[ref.number, ref.view] = value
            value = self.algebra.union([self.values.get(ref.number), value])
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
        factor = times(factors[0], factors[1] if name == "mul" else power_of(factors[1], -1))
        if len(set(factor)) > 1 or any(map(math.isnan, factor)):
            self.values[node.outs[0].number] = Value({(): ((factor,),)}, constant=True)

    def apply(self, name: str, nodes: tuple[Node, ...]) -> Any:
        node = nodes[0]
        first = self.value(_arg(node, 0))
        if name in ops.FORGETS:
            return None
        if name in ("mul", "div", "multiply", "divide", "true_divide", "addcmul", "addcdiv"):
            return self._scaled(name, nodes)
        if name in ops.MATMULS:
            return self._matmul(name, nodes)
        if name == "lerp":
            return self._between(nodes)
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
        if name in _SHAPED and self._changes(nodes):
            for ref in node.refs:
                self.algebra.end(self.value(ref), "unknown", f"{name}, which is given other numbers at other widths")
            return self.algebra.opaque(*(self.value(r) for r in node.refs))
        if name in ops.SAME:
            return self.value(_arg(node, 1)) if name == "copy" else next(filter(None, map(self.value, node.refs)))
        if name in ops.SUMS:
            return self._added(name, nodes)
        if name.startswith("clamp_min") and first is not None and first.source is not None:
            return first  # the eps of a norm
        inputs = [self.value(r) for r in node.refs]
        if name in ops.NONLINEAR or name in ops.SOFTMAX or name in ops.LOG_SOFTMAX:
            for value in inputs:
                self.algebra.end(value, "used", name if name in ops.LOG_SOFTMAX else "")
            return self.algebra.opaque(*map(self.algebra.known, inputs), softmax=name in ops.SOFTMAX)
        if not any(ref.floating for ref in node.outs):
            return None
        for value in inputs:
            self.algebra.end(value, "unknown", name)
        return replace(self.algebra.opaque(*map(self.algebra.known, inputs)), unknown=name)

    def _scaled(self, name: str, nodes: tuple[Node, ...]) -> Value | None:
        node = nodes[0]
        if name.startswith("addc"):  # addcmul(x, a, b, value): x + value * a * b
            product = self._multiplied(
                self.value(node.args[1]), self.value(node.args[2]), name == "addcdiv", nodes, (1, 2)
            )
            if product is not None:
                product = self.algebra.scaled(product, self.number([n.kwargs.get("value", 1) for n in nodes]))
            return self.algebra.union([self.value(node.args[0]), product])
        if _same(node.args[0], _arg(node, 1)):
            return self.algebra.homogeneous(self.value(node.args[0]), 2.0 if name == "mul" else 0.0, self.algebra.ones)
        return self._multiplied(self.value(_arg(node, 0)), self.value(_arg(node, 1)), "div" in name, nodes, (0, 1))

    def _multiplied(self, a, b, divided: bool, nodes, places) -> Value | None:
        a_known, b_known = self.algebra.known(a), self.algebra.known(b)
        if a_known is None and b_known is None:
            return None
        if b_known is None or a_known is None:  # by a constant
            if b_known is None:
                factor = self.number([_arg(n, places[1]) for n in nodes])
                return self.algebra.scaled(a_known, power_of(factor, -1) if divided else factor)
            factor = self.number([_arg(n, places[0]) for n in nodes])
            if divided:
                b_known = self.algebra.homogeneous(b_known, -1.0, self.algebra.ones)
            return self.algebra.scaled(b_known, factor)
        if divided:
            if a_known.source is None and b_known.source is None and products_only(a_known) and products_only(b_known):
                return self.algebra.opaque(a_known, b_known)  # a weighted mean: the scale of its weights cancels
            b_known = self.algebra.homogeneous(b_known, -1.0, self.algebra.ones)
        return self.algebra.product(a_known, b_known)

    def _between(self, nodes: tuple[Node, ...]) -> Value | None:
        """lerp(a, b, weight): a + weight * (b - a)."""
        node = nodes[0]
        a, b = (self.algebra.plain(self.algebra.known(self.value(_arg(node, i)))) for i in (0, 1))
        weight = self.algebra.known(self.value(_arg(node, 2)))
        if weight is not None:
            return self.algebra.union([a, b])
        part = self.number([_arg(n, 2) for n in nodes])
        rest = tuple(1.0 - p if p != 1 else 1.0 for p in part)
        return self.algebra.union([a and self.algebra.scaled(a, rest), b and self.algebra.scaled(b, part)])

    def _changes(self, nodes: tuple[Node, ...]) -> bool:
        """Is an operation that is no product given other numbers at other widths (softplus' beta, a clamp's bounds)?"""
        given = [[a for a in (*n.args, *n.kwargs.values()) if isinstance(a, float)] for n in nodes]
        return any(len(g) == len(given[0]) and not all(map(math.isclose, g, given[0])) for g in given[1:])

    def _added(self, name: str, nodes: tuple[Node, ...]) -> Value | None:
        node = nodes[0]
        values = [self.value(r) for r in node.refs]
        alpha = [n.kwargs.get("alpha", 1) for n in nodes]
        if name in ("add", "sub", "index_add") and any(a != 1 for a in alpha) and self.algebra.known(values[-1]):
            values = [self.value(node.args[0]), self.algebra.scaled(values[-1], self.number(alpha))]
        return self.algebra.union(values)

    def _power_of(self, name: str, nodes: tuple[Node, ...]) -> Any:
        node = nodes[0]
        value = self.algebra.known(self.value(node.args[0]))
        if value is None:  # a number to the power of a weight
            self.algebra.end(self.value(_arg(node, 1)), "used")
            return self.algebra.opaque(self.value(_arg(node, 1)))
        if value.weight and name not in ("linalg_vector_norm", "norm"):
            self.algebra.end(used(value, "scale"), "used")
            return self.algebra.opaque(value)
        counts = self._counts(nodes)
        match name:
            case "pow":
                power = _arg(node, 1)
                if isinstance(power, Ref):
                    self.algebra.end(value, "used")
                    return self.algebra.opaque(value)
                return self.algebra.homogeneous(value, float(power), self.algebra.ones)
            case "linalg_vector_norm" | "norm":
                order = _arg(node, 1)
                order = 2.0 if order is None or isinstance(order, str | Ref) else float(order)
                count = self.algebra.ones if math.isinf(order) or order == 0 else power_of(counts, 1 / order)
                return self.algebra.homogeneous(value, 1.0, count)
            case "var" | "std":
                return self.algebra.homogeneous(value, 2.0 if name == "var" else 1.0, self.algebra.ones)
            case "var_mean" | "std_mean":
                return [self.algebra.homogeneous(value, 2.0 if name == "var_mean" else 1.0, self.algebra.ones), value]
        return self.algebra.homogeneous(value, _POWERS[name], self.algebra.ones)

    def _counts(self, nodes: tuple[Node, ...]) -> Vector:
        return tuple(math.prod(n.args[0].shape) / max(math.prod(n.outs[0].shape), 1) for n in nodes)

    def _sum(self, name: str, nodes: tuple[Node, ...]) -> Value | None:
        value = self.value(nodes[0].args[0])
        counts = self._counts(nodes)
        grows = len(set(counts)) > 1
        if value is None or not grows:
            return value
        lengths = tuple(round(c) for c in counts)
        back = self.algebra.ones if name == "sum" else power_of(counts, -1)
        if value.source is not None or value.opaque:
            return self.algebra.scaled(value, counts) if name == "sum" else value
        terms: dict[Chain, tuple[Factors, ...]] = {}
        for chain, factors in value.terms.items():
            last = chain[-1]
            extra = counts
            if isinstance(last, Use) and last.kind == "scale":  # (x * w).sum(-1) is a product with w
                chain, extra = (*chain[:-1], replace(last, kind="matmul", fan_in=lengths)), self.algebra.ones
            elif isinstance(last, Product) and set(last.length) == {1}:  # (q * k).sum(-1)
                chain, extra = (*chain[:-1], replace(last, length=lengths)), self.algebra.ones
            if name != "sum" and extra == counts:  # a mean of like things is as large as they are
                terms[chain] = factors
            else:
                terms[chain] = tuple((*f[:-1], times(f[-1], extra, back)) for f in factors)
        return replace(value, terms=terms)

    def _matmul(self, name: str, nodes: tuple[Node, ...]) -> Value | None:
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
        result = self.algebra.contracted(a, b, shapes, transposed, oriented)
        if result is not None:
            alpha = [n.kwargs.get("alpha", _arg(n, 4, 1)) if added else 1 for n in nodes]
            result = self.algebra.scaled(result, self.number(alpha))
        bias = nodes[0].args[0] if added else _arg(nodes[0], 2) if transposed else None
        bias = self.value(bias)
        if bias is not None and added:
            bias = self.algebra.scaled(bias, self.number([n.kwargs.get("beta", _arg(n, 3, 1)) for n in nodes]))
        if bias is not None and bias.weight:
            bias = used(bias, "add")
        return self.algebra.union([result, bias])

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

    def _attend(self, query, key, value, lengths, scale: Vector) -> Value | None:
        query, key = self.algebra.plain(self.algebra.known(query)), self.algebra.plain(self.algebra.known(key))
        if query is not None and key is not None:
            self.algebra.end(self.algebra.scaled(self.algebra.joined_products(query, key, lengths), scale), "used")
        else:
            self.algebra.end(query or key, "used")
        value = self.algebra.plain(self.algebra.known(value))
        return self.algebra.opaque(query, key) if value is None else replace(value, softmax=False)

    def _flex(self, name: str, nodes: tuple[Node, ...]) -> Value | None:
        a, b = (self.algebra.plain(self.algebra.known(self.value(r))) for r in nodes[0].args[:2])
        if name == "flex_values":
            self.algebra.end(a, "used")
            return b
        lengths = tuple(n.args[0].shape[-1] for n in nodes)
        scale = self.number([1 / math.sqrt(n.args[0].shape[-1]) if n.args[2] is None else n.args[2] for n in nodes])
        if a is None or b is None:
            return a or b
        return self.algebra.scaled(self.algebra.joined_products(a, b, lengths), scale)

    def _convolution(self, nodes: tuple[Node, ...]) -> Any:
        node = nodes[0]
        x, w, bias = (self.algebra.plain(self.value(_arg(node, i))) for i in range(3))
        transposed = node.op == "convolution" and bool(_arg(node, 6))
        if w is None or not w.weight:
            for value in (x, w):
                self.algebra.end(value, "unknown", node.op)
            return replace(self.algebra.opaque(x, w), unknown=node.op)
        shapes = [n.args[1].shape for n in nodes]
        grouped = [_arg(n, 8, 1) if n.op == "convolution" else 1 for n in nodes]
        fan_in = tuple(
            (s[0] // g if transposed else s[1]) * math.prod(s[2:]) for s, g in zip(shapes, grouped, strict=True)
        )
        fan_out = tuple(s[1] * g if transposed else s[0] for s, g in zip(shapes, grouped, strict=True))
        result = self.algebra.joined(x or self.algebra.opaque(), used(w, "matmul", fan_in, fan_out))
        return [self.algebra.union([result, bias])]

    def _lookup(self, nodes: tuple[Node, ...]) -> Any:
        weight = self.value(nodes[0].args[0])
        if weight is None or not weight.weight:
            return [weight]
        fan_out = tuple(n.args[0].shape[-1] for n in nodes)
        return [used(weight, "lookup", self.algebra.one_each(), fan_out)] * len(nodes[0].outs)

    def _norm(self, name: str, nodes: tuple[Node, ...]) -> Any:
        node = nodes[0]
        at, weight_at, bias_at = ops.NORMS[name]
        x = self.algebra.plain(self.algebra.known(self.value(_arg(node, at))))
        self.algebra.end(x, "norm")
        result = self.algebra.opaque(x)
        weight = self.value(_arg(node, weight_at))
        if weight is not None and weight.weight:
            result = self.algebra.joined(result, used(weight, "scale"))
        bias = None if bias_at is None else self.value(_arg(node, bias_at))
        return [self.algebra.union([result, bias])]


_SHAPED = ops.NONLINEAR | ops.SAME | ops.SUMS - {"add", "sub", "rsub", "index_add", "where"}
SAME_SIZE = 1.2  # by which the size of a constant tensor may differ between widths, as cosines of other angles do
_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "abs": 1.0}
_INDEXING = ("index", "index_select", "gather")
_ATTENTION = ("_varlen_attn", "_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward")


def _arg(node: Node, place: int | None, default: Any = None) -> Any:
    return node.args[place] if place is not None and place < len(node.args) else default


def _no_number(given: Any) -> bool:
    return given is None or (isinstance(given, Ref) and given.value is None)


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Ref) and isinstance(b, Ref) and a.number == b.number
