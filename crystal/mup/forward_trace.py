"""Reads a model's forward multipliers off its real forward pass, on the meta device.

muP's multipliers are constants that the code applies somewhere between a weight and whatever consumes its output:
embedding x alpha, logits / m, scores x 1/d, residual branch x m_L^-alpha. A dispatch mode runs the forward pass
without data and follows every weight's output through views, casts, rotations and scalar products up to the first
operation that mixes it with something else. The product of the scalars met on the way is the multiplier that the
weight really gets; running training and inference apart shows one that is applied in only one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Multipliers:
    """What one forward pass applies.

    outputs: (tensor, use) → factors met, use being `lookup` (an embedding) or `matmul`; scores: (query's tensor,
    key's tensor) → (factors, length of the dot products). More than one factor: applied differently in places.
    """

    outputs: dict[tuple[str, str], frozenset[float]]
    scores: dict[tuple[str, str], tuple[frozenset[float], int]]


@dataclass(frozen=True)
class _Mark:
    """What is known of a tensor. kind: weight (a parameter or a view of one), output (of a weight), scores (of two
    outputs) or mixed (any other function of parameters). Constants and data have no mark."""

    kind: str
    names: tuple = ()
    factor: float = 1.0
    length: int = 0


_MIXED = _Mark("mixed")
_SAME = set(
    """view _unsafe_view reshape transpose permute t expand unsqueeze squeeze slice select split split_with_sizes chunk
    clone _to_copy contiguous alias detach unbind as_strided repeat index_select roll neg narrow movedim flatten
    unflatten lift_fresh swapaxes unsafe_split to float _reshape_alias""".split()
)
_PRODUCTS = set("mm addmm bmm baddbmm linear matmul embedding convolution einsum dot mv addmv".split())


@dataclass
class _Trace(TorchDispatchMode):
    names: dict[int, str]  # id of a parameter → its name
    outputs: dict[tuple[str, str], set] = field(default_factory=dict)
    scores: dict[tuple[str, str], tuple[set, int]] = field(default_factory=dict)

    def __post_init__(self):
        super().__init__()
        self.marks: dict[int, tuple[Tensor, _Mark]] = {}  # the tensor is kept, so that no id comes twice

    def mark(self, tensor: Any) -> _Mark | None:
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) in self.names:
            return _Mark("weight", (self.names[id(tensor)],))
        return self.marks[id(tensor)][1] if id(tensor) in self.marks else None

    def set(self, out: Any, mark: _Mark | None) -> None:
        for tensor in _tensors(out):
            if mark is not None and id(tensor) not in self.names:
                self.marks[id(tensor)] = (tensor, mark)

    def end(self, *marks: _Mark | None) -> None:
        """These tensors are consumed: whatever multiplied them is now known."""
        for mark in marks:
            if mark is not None and mark.kind == "output":
                self.outputs.setdefault(mark.names, set()).add(mark.factor)
            elif mark is not None and mark.kind == "scores":
                self.scores.setdefault(mark.names, (set(), mark.length))[0].add(mark.factor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function._overloadpacket.__name__
        marks = [m for m in map(self.mark, _tensors([args, list(kwargs.values())])) if m is not None]
        if marks:
            self.set(out, self._after(name, args, kwargs, marks))
        return out

    def _after(self, name: str, args: tuple, kwargs: dict, marks: list[_Mark]) -> _Mark:
        plain = name.rstrip("_")
        if name in _SAME or plain == "copy":
            return marks[-1]
        if plain in ("mul", "div"):
            return self._scaled(plain, args, marks)
        if name in _PRODUCTS:
            return self._product(name, args, marks)
        if "scaled_dot_product" in name:
            query, key = self.mark(args[0]), self.mark(args[1])
            scale = kwargs.get("scale") or 1 / math.sqrt(args[0].shape[-1])
            self.end(self._scores(query, key, args[0].shape[-1], scale))
            self.end(self.mark(args[2]))
            return _MIXED
        if plain in ("add", "sub", "cat", "stack", "where", "masked_fill") and len(set(marks)) == 1:
            return marks[0]  # with itself (a rotation), or with a constant (a mask)
        self.end(*marks)
        return _MIXED

    def _scaled(self, name: str, args: tuple, marks: list[_Mark]) -> _Mark:
        other = args[1] if self.mark(args[0]) is not None else args[0]
        if self.mark(other) is None or not isinstance(other, Tensor):
            number = _number(other)
            if number is None:  # a tensor of constants, such as a rotation's cosines
                return marks[0]
            return replace(marks[0], factor=marks[0].factor * (number if name == "mul" else 1 / number))
        self.end(*marks)
        return _MIXED

    def _product(self, name: str, args: tuple, marks: list[_Mark]) -> _Mark:
        operands = [self.mark(a) for a in (args[1:3] if name in ("addmm", "baddbmm", "addmv") else args[:2])]
        weight = next((m for m in operands if m is not None and m.kind == "weight"), None)
        if weight is not None:
            x = next((m for m in operands if m is not weight), None)
            self.end(x)
            before = x.factor if x is not None and x.kind == "mixed" else 1.0
            use = "lookup" if name == "embedding" else "matmul"
            return _Mark("output", (weight.names[0], use), weight.factor * before)
        if len(operands) == 2 and all(m is not None and m.kind == "output" for m in operands):
            contracted = args[-2] if name == "baddbmm" else args[0]
            return self._scores(*operands, contracted.shape[-1], 1.0)
        self.end(*marks)
        return _MIXED

    def _scores(self, query: _Mark | None, key: _Mark | None, length: int, scale: float) -> _Mark:
        if query is None or key is None or {query.kind, key.kind} != {"output"}:
            self.end(query, key)
            return _MIXED
        return _Mark("scores", (query.names[0], key.names[0]), query.factor * key.factor * scale, length)


def trace_multipliers(model: nn.Module, call: Callable[[nn.Module], Any]) -> Multipliers:
    """Run call(model) on meta and report every weight's forward multiplier and the scores' scale.

    model: on the meta device; call: runs one forward pass, and makes its own inputs (under torch.device("meta")).
    """
    trace = _Trace({id(p): name for name, p in model.named_parameters()})
    with torch.no_grad(), torch.device("meta"), trace:
        result = call(model)
    trace.end(*(trace.mark(t) for t in _tensors(result)))
    return Multipliers(
        {use: frozenset(_rounded(f)) for use, f in trace.outputs.items()},
        {pair: (frozenset(_rounded(f)), length) for pair, (f, length) in trace.scores.items()},
    )


def _rounded(factors: set) -> set:
    """Factors that differ by rounding are one: sqrt(c) * sqrt(c) is not quite c."""
    return {float(f"{abs(f):.12g}") for f in factors}


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        if value.ndim or value.is_meta:
            return math.nan if value.ndim == 0 else None  # a scalar whose value meta does not hold
        return float(value)
    return float(value) if isinstance(value, int | float) else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return _tensors(vars(value)) if hasattr(value, "__dataclass_fields__") else []
