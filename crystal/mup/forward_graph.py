"""Records the operations of one forward pass: which ran, on what, and which numbers the code put in.

The recording is data: what it means for muP is read from it afterwards (forward_trace.py), from the recordings of
several widths side by side.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from crystal.mup.aten_ops import LAYOUT

# operations that leave one value in all of a tensor, which meta does not hold
_FILLS: dict[str, Callable[[tuple], float | None]] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero_"), lambda args: 0.0),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda args: 1.0),
    **dict.fromkeys(("full", "full_like", "fill_", "scalar_tensor", "new_full"),
                    lambda args: float(args[-1]) if isinstance(args[-1], int | float) else None),
}  # fmt: skip
_LARGEST = 1 << 20  # elements of a constant whose size is looked at
_UNIFORM = 4096  # largest constant that is looked into: do all its elements have one value?


@dataclass(frozen=True)
class Ref:
    """A tensor of the recording; views and copies of a tensor have its number and a shape of their own.

    view: which view it is; strides: of its dimensions. value: of every element of a constant; nan: constant, but meta
    does not hold it; None: a constant that is not uniform, or no constant. parameter: its name, if it is one that is
    trained, or a matrix. size: root mean square of a constant of several values; 0 where it is not known.
    """

    number: int
    shape: tuple[int, ...]
    floating: bool
    view: int
    strides: tuple[int, ...]
    value: float | None = None
    parameter: str | None = None
    size: float = 0.0


@dataclass(frozen=True)
class Node:
    """One operation. args and kwargs: as called, with a Ref for every tensor; outs: its results, in order."""

    op: str
    args: tuple
    kwargs: dict
    outs: tuple[Ref, ...]

    @property
    def refs(self) -> list[Ref]:
        """The tensors it was given, in order."""
        return refs_in((self.args, tuple(self.kwargs.values())))

    @property
    def in_place(self) -> bool:
        return self.op.endswith("_") and not self.op.startswith("__")


@dataclass(frozen=True)
class Graph:
    """nodes in the order they ran; results: the floating tensors that the call returned; modules: (name of a module,
    refs of what it returned, by key)."""

    nodes: tuple[Node, ...]
    results: tuple[Ref, ...]
    modules: tuple[tuple[str, tuple[tuple[str, Ref], ...]], ...]


class _Recorder(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module):
        super().__init__()
        self.nodes: list[Node] = []
        self.numbers: dict[int, tuple[int, int]] = {}  # id of a tensor → its number, and which view of it that is
        self.views = 0
        self.count = 0
        self.made: set[int] = set()  # numbers of tensors that are functions of parameters
        self.looked: dict[tuple, tuple[float | None, float]] = {}
        self.filled: dict[int, float] = {}  # number of a constant → its one value, where an operation says it
        self.alive: list[Tensor] = []  # so that no id comes twice
        self.names: dict[int, str] = {}  # number → name of the parameter
        for name, p in model.named_parameters():
            if p.requires_grad or p.ndim > 1:  # a frozen scale is a constant like any other
                self.names[self.ref(p).number] = name

    def ref(self, tensor: Tensor) -> Ref:
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = (self.count, self._view())
            self.count += 1
            self.alive.append(tensor)
        number, view = self.numbers[id(tensor)]
        name = self.names.get(number)
        value, size = (None, 0.0) if name or number in self.made else self._constant(number, tensor)
        floats = tensor.is_floating_point() or tensor.is_complex()
        strides = tensor.stride() if tensor.layout == torch.strided else ()
        return Ref(number, tuple(tensor.shape), floats, view, strides, value, name, size)

    def _constant(self, number: int, tensor: Tensor) -> tuple[float | None, float]:
        """(the one value of all elements, or their root mean square); looked at once for each time it was written."""
        if number in self.filled:
            return self.filled[number], 0.0
        key = (number, tuple(tensor.shape), tensor._version)
        if key not in self.looked:
            value = _uniform(tensor)
            self.looked[key] = (value, 0.0 if value is not None else _rms(tensor))
        return self.looked[key]

    def _view(self) -> int:
        self.views += 1
        return self.views

    def refs(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, list | tuple):
            return tuple(self.refs(v) for v in value)
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return value.node.maybe_as_int() if isinstance(value, torch.SymInt) else float(value)
        return value

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "_overloadpacket", function).__name__
        if name == "flex_attention":
            return self._flex(function, args, kwargs)
        given, named = self.refs(args), {k: self.refs(v) for k, v in kwargs.items()}
        out = function(*args, **kwargs)
        self.put(name, given, named, out)
        return out

    def put(self, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        """Add a node; outputs of an operation on constants alone that have one value keep it."""
        tensors = tensors_of(out)
        if name in LAYOUT and args and isinstance(args[0], Ref):
            for t in tensors:
                if id(t) not in self.numbers:
                    whole = t.numel() == math.prod(args[0].shape)
                    self.numbers[id(t)] = (args[0].number, args[0].view if whole else self._view())
                    self.alive.append(t)
            return
        fixed = not any(r.number in self.made or r.parameter for r in refs_in((args, tuple(kwargs.values()))))
        if not fixed:
            self.made |= {self.ref(t).number for t in tensors} - self.names.keys()
        for t in tensors if fixed else ():
            number = self.ref(t).number
            self.filled.pop(number, None)
            if name in _FILLS and (fill := _FILLS[name](args)) is not None:
                self.filled[number] = fill
        self.nodes.append(Node(name, args, kwargs, tuple(self.ref(t) for t in tensors)))

    def _flex(self, function, args, kwargs):
        """flex_attention as its parts: scores, the caller's own change of them, their product with the values."""
        query, key, value, change, _, scale = args[:6]
        score = query.new_zeros(())
        self.put("flex_scores", (self.ref(query), self.ref(key), scale), {}, score)
        self.made.add(self.ref(score).number)
        with self:
            spots = [torch.zeros((), dtype=torch.int64, device=query.device) for _ in range(4)]
            score = change(score, *spots)
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        self.put("flex_values", (self.ref(score), self.ref(value)), {}, out)
        return out, query.new_zeros(query.shape[:-1]), query.new_zeros(query.shape[:-1])


def record(model: nn.Module, call: Callable[[nn.Module], Any]) -> Graph:
    """Run call(model) once and record it; parameters are named as in model.named_parameters().

    The device is the model's: on meta nothing is computed.
    """
    recorder = _Recorder(model)
    outputs: list[tuple[str, tuple[tuple[str, Ref], ...]]] = []

    def hook(name: str):
        def keep(module, inputs, output):
            found = tuple((key, recorder.ref(t)) for key, t in members(output))
            outputs.append((name, found))

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad(), _in_parts(), recorder:
            result = call(model)
    finally:
        for handle in handles:
            handle.remove()
    results = tuple(recorder.ref(t) for t in tensors_of(result) if t.is_floating_point())
    return Graph(tuple(recorder.nodes), results, tuple(outputs))


@contextmanager
def _in_parts() -> Iterator[None]:
    """Where torch would fuse or compile attention, have it run the operations that it is made of."""
    from torch.nn.attention import flex_attention  # which takes a quarter of a second where nothing else needs it

    fast, flex = torch.backends.mha.get_fastpath_enabled(), "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    compiled = getattr(flex_attention, flex, None)
    torch.backends.mha.set_fastpath_enabled(False)
    setattr(flex_attention, flex, True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flex_attention's advice to compile it
            with torch.backends.mkldnn.flags(enabled=False, deterministic=None):  # it has an LSTM in one operation
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        setattr(flex_attention, flex, compiled)


def members(output: Any, key: str = "") -> list[tuple[str, Tensor]]:
    """(key, tensor) of every floating tensor in a module's output: a tensor, tuple, dict or dataclass of them.

    The first, and what is called logits, have the key ""; the others are called by place or name.
    """
    found = _members(output, key)
    main = next((k for k, _ in found if k.rpartition(".")[2] == "logits"), found[0][0] if found else "")
    return [("" if k == main else k, t) for k, t in found]


def _members(output: Any, key: str) -> list[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        return [(key, output)] if output.is_floating_point() and output.ndim else []
    if isinstance(output, dict):
        parts = output.items()
    elif isinstance(output, list | tuple):
        parts = zip(getattr(output, "_fields", range(len(output))), output, strict=True)
    elif hasattr(output, "__dataclass_fields__"):
        parts = vars(output).items()
    else:
        return []
    return [pair for k, v in parts for pair in _members(v, f"{key}.{k}".lstrip("."))]


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_of(v)]
    return tensors_of(vars(value)) if hasattr(value, "__dataclass_fields__") else []


def refs_in(value: Any) -> list[Ref]:
    """All tensors in what an operation was given, as `_Recorder.refs` has it."""
    if isinstance(value, Ref):
        return [value]
    return [r for v in value for r in refs_in(v)] if isinstance(value, tuple) else []


def _uniform(tensor: Tensor) -> float | None:
    """The one value of all elements of a constant."""
    if not tensor.is_floating_point() and not (tensor.ndim == 0 and not tensor.is_meta):
        return None
    if tensor.is_meta:
        return float("nan") if tensor.numel() == 1 else None
    if not 0 < tensor.numel() <= _UNIFORM or tensor.dtype == torch.bool:
        return None
    with torch.utils._python_dispatch._disable_current_modes():
        flat = tensor.detach().reshape(-1)
        first = flat[0].item()
        return float(first) if bool((flat == first).all()) else None


def _rms(tensor: Tensor) -> float:
    """Root mean square of a constant that is not large; 0 where it is not finite, or on meta."""
    floats = tensor.is_floating_point() or tensor.is_complex()
    if tensor.is_meta or not floats or not 0 < tensor.numel() <= _LARGEST:
        return 0.0
    with torch.utils._python_dispatch._disable_current_modes():
        size = tensor.detach().abs().double().square().mean().sqrt().item()
    return size if math.isfinite(size) else 0.0
