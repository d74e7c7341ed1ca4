"""Reads what an initialiser draws, without drawing: on the meta device, at any size, in seconds.

Code that fills a tensor comes down to a handful of in-place operations (normal_, uniform_, fill_, …). A dispatch
mode watches them and keeps for every part of every storage the distribution that its last writer left there, so the
sigma of a 7B's tensor is read off the call that would draw it. Whatever it cannot follow it calls `unknown`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.utils._python_dispatch import TorchDispatchMode

from crystal.mup.regions import Box, box_of, common, moved, whole, without


@dataclass(frozen=True)
class Draw:
    """A tensor's distribution. kind: normal | uniform | constant | unknown | none (never written) | parts.

    std: standard deviation, of the parent normal where `cut` (a bound in absolute units) truncates it; mean: its
    centre, or the constant. parts: what different parts of the tensor are drawn from.
    """

    kind: str
    std: float = 0.0
    mean: float = 0.0
    cut: float | None = None
    parts: tuple[Draw, ...] = ()

    def __str__(self) -> str:
        if self.kind == "constant":
            return f"{self.mean:g}"
        if self.kind == "parts":
            return " | ".join(map(str, self.parts))
        if self.kind in ("unknown", "none"):
            return self.kind
        return f"{self.kind} {self.std:.4g}" + (f" cut {self.cut:.4g}" if self.cut else "")

    def each(self) -> tuple[Draw, ...]:
        """The draws of its parts, or itself."""
        return self.parts or (self,)


UNKNOWN, NONE = Draw("unknown"), Draw("none")

# torch's initialisers that do nothing on meta, so that the mode would not see them
_TRUNCATED, _SILENT = "_no_grad_trunc_normal_", ("orthogonal_", "dirac_", "eye_", "sparse_")

# Operations whose result holds the same values: views share the storage, these copy it.
_COPIES = {"clone", "_to_copy", "contiguous", "detach", "lift_fresh", "alias"}
_EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


@dataclass
class _Storage:
    """What was written into one storage, by boxes of the tensor that owns it; they do not overlap."""

    shape: tuple[int, ...]
    parts: list[tuple[Box, Draw]]


@dataclass(eq=False)
class Draws(TorchDispatchMode):
    """`with Draws() as draws: model = factory()`; then `draws[tensor]`."""

    found: dict[int, _Storage] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # a storage that is freed could hand its address to another

    def __post_init__(self):
        super().__init__()

    def __getitem__(self, tensor: Tensor) -> Draw:
        parts = tuple(draw for _, part in sorted(self.read(tensor), key=_place) for draw in part.each())
        return parts[0] if len(set(parts)) == 1 else Draw("parts", parts=parts)

    def read(self, tensor: Tensor) -> list[tuple[Box | None, Draw]]:
        """What parts of a tensor hold; a box in the tensor's own dimensions, or None where it is not known."""
        storage = self.found.get(_storage(tensor))
        if storage is None:
            return [(None, UNKNOWN)]
        if _covers(tensor) and tuple(tensor.shape) == storage.shape and tensor.is_contiguous():
            return list(storage.parts)
        box = whole(storage.shape) if _covers(tensor) else box_of(tensor, storage.shape)
        if box is None:
            box = whole(storage.shape)
        return [(None, draw) for part, draw in storage.parts if common(part, box)]

    def set(self, tensor: Tensor, draw: Draw) -> None:
        self.write(tensor, [(None, draw)])

    def write(self, tensor: Tensor, parts: list[tuple[Box | None, Draw]]) -> None:
        """Leave these draws in the part of its storage that a tensor is."""
        self.alive.append(tensor)
        distinct = list(dict.fromkeys(draw for _, draw in parts))
        together = distinct[0] if len(distinct) == 1 else Draw("parts", parts=tuple(distinct))
        storage = self.found.get(_storage(tensor))
        if _covers(tensor):
            shape = tuple(tensor.shape)
            known = [(box, draw) for box, draw in parts if box is not None]
            if not tensor.is_contiguous() or len(known) < len(parts):
                known = [(whole(shape), together)]
            self.found[_storage(tensor)] = _Storage(shape, known)
            return
        if storage is None:  # a part of something that was never seen
            storage = self.found[_storage(tensor)] = _Storage((_numel(tensor),), [(((0, _numel(tensor)),), UNKNOWN)])
        box = box_of(tensor, storage.shape)
        if box is None:  # somewhere in it
            whole_box = whole(storage.shape)
            old = [d for _, part in storage.parts for d in part.each()]
            parts = tuple(dict.fromkeys((*old, *together.each())))
            storage.parts = [(whole_box, parts[0] if len(parts) == 1 else Draw("parts", parts=parts))]
            return
        kept = [(rest, draw) for part, draw in storage.parts for rest in without(part, box)]
        storage.parts = [*kept, (box, together)]

    def change(self, tensor: Tensor, how: Callable[[Draw], Draw]) -> None:
        """Apply a function to whatever is drawn in the part of its storage that a tensor is."""

        def each(draw: Draw) -> Draw:
            return replace(draw, parts=tuple(map(how, draw.parts))) if draw.parts else how(draw)

        storage = self.found.get(_storage(tensor))
        box = None if storage is None else whole(storage.shape) if _covers(tensor) else box_of(tensor, storage.shape)
        if storage is None or box is None:
            self.set(tensor, UNKNOWN)
            return
        changed: list[tuple[Box, Draw]] = []
        for part, draw in storage.parts:
            changed += [(rest, draw) for rest in without(part, box)]
            if (inside := common(part, box)) is not None:
                changed.append((inside, each(draw)))
        storage.parts = changed

    def __enter__(self) -> Draws:
        self.torchs = {name: getattr(init, name) for name in (_TRUNCATED, *_SILENT)}
        setattr(init, _TRUNCATED, self._truncated)
        for name in _SILENT:
            setattr(init, name, self._unread(self.torchs[name]))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        for name, function in self.torchs.items():
            setattr(init, name, function)
        super().__exit__(*error)

    def _truncated(self, tensor, mean, std, a, b, generator=None) -> Tensor:
        if not tensor.is_meta:
            self.torchs[_TRUNCATED](tensor, mean, std, a, b, generator)
        self.set(tensor, Draw("normal", std, mean, min(b - mean, mean - a)))
        return tensor

    def _unread(self, function: Callable) -> Callable:
        def fill(tensor, *args, **kwargs) -> Tensor:
            if not tensor.is_meta:
                function(tensor, *args, **kwargs)
            self.set(tensor, UNKNOWN)
            return tensor

        return fill

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._overloadpacket.__name__
        if "generator" in kwargs and any(isinstance(a, Tensor) and a.is_meta for a in args):
            kwargs = {k: v for k, v in kwargs.items() if k != "generator"}  # a CPU generator, and nothing is drawn
        out = function(*args, **kwargs)
        if isinstance(out, Tensor):
            self._follow(name, out, args)
        return out

    def _follow(self, name: str, out: Tensor, args: tuple) -> None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        numbers = [a for a in args if isinstance(a, int | float) and not isinstance(a, bool)]
        in_place = name.endswith("_") and first is not None
        match name.rstrip("_"):
            case "normal":
                mean, std = [*numbers, 0.0, 1.0][:2] if len(numbers) != 1 else (numbers[0], 1.0)
                self.set(out, Draw("normal", float(std), float(mean)))
            case "randn" | "randn_like":
                self.set(out, Draw("normal", 1.0))
            case "uniform" | "rand" | "rand_like":
                a, b = numbers[:2] if name == "uniform_" and len(numbers) >= 2 else (0.0, 1.0)
                self.set(out, Draw("uniform", (b - a) / math.sqrt(12), (a + b) / 2))
            case "zero" | "zeros" | "zeros_like" | "new_zeros":
                self.set(out, Draw("constant", mean=0.0))
            case "ones" | "ones_like" | "new_ones":
                self.set(out, Draw("constant", mean=1.0))
            case "fill" | "full" | "full_like" | "new_full":
                self.set(out, Draw("constant", mean=float(numbers[-1])) if numbers else UNKNOWN)
            case "masked_fill" if in_place and numbers:  # somewhere in it
                old = [d for _, part in self.read(out) for d in part.each()]
                parts = tuple(dict.fromkeys((*old, Draw("constant", mean=float(numbers[-1])))))
                self.set(out, parts[0] if len(parts) == 1 else Draw("parts", parts=parts))
            case "mul" | "div" if first is not None and len(numbers) == 1:
                c = numbers[0] if name.startswith("mul") else 1 / numbers[0] if numbers[0] else math.inf
                self._copy(first, out)
                self.change(out, lambda old: _scaled(old, c))
            case "add" | "sub" if first is not None and len(numbers) == 1:
                shift = numbers[0] if name.startswith("add") else -numbers[0]
                self._copy(first, out)
                self.change(out, lambda old: old if old in (UNKNOWN, NONE) else replace(old, mean=old.mean + shift))
            case "copy" if in_place and isinstance(args[1], Tensor):
                self._copy(args[1], out)
            case "cat" | "concat" if isinstance(args[0], list | tuple):
                self._concatenate(out, args[0], numbers[0] if numbers else 0)
            case "index_put" | "index_fill" if in_place:
                old = [d for _, part in self.read(out) for d in part.each()]
                new = self[args[2]] if isinstance(args[2], Tensor) else UNKNOWN
                value = args[2] if isinstance(args[2], Tensor) and args[2].ndim == 0 and not args[2].is_meta else None
                new = Draw("constant", mean=float(value)) if value is not None and new == UNKNOWN else new
                self.set(out, Draw("parts", parts=tuple(dict.fromkeys((*old, *new.each())))))
            case other if other in _EMPTY:
                self.set(out, NONE)
            case other if other in _COPIES and first is not None:
                if _storage(out) != _storage(first):
                    self._copy(first, out)
            case _ if in_place or not _shares(out, args):
                self.set(out, UNKNOWN)

    def _copy(self, source: Tensor, out: Tensor) -> None:
        if source is not out:
            parts = self.read(source)
            same = tuple(source.shape) == tuple(out.shape)
            self.write(out, parts if same else [(None, draw) for _, draw in parts])

    def _concatenate(self, out: Tensor, tensors: list[Tensor], dim: int) -> None:
        dim = dim % out.ndim
        at, parts = 0, []
        for tensor in tensors:
            if tensor.ndim != out.ndim:
                continue
            box = moved(whole(tuple(tensor.shape)), dim, at)
            for part, draw in self.read(tensor):
                parts.append((box if part is None else moved(part, dim, at), draw))
            at += tensor.shape[dim]
        self.write(out, parts)


def _scaled(draw: Draw, by: float) -> Draw:
    if draw in (UNKNOWN, NONE):
        return draw
    cut = None if draw.cut is None else draw.cut * abs(by)
    return replace(draw, std=draw.std * abs(by), mean=draw.mean * by, cut=cut)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _numel(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1)


def _covers(tensor: Tensor) -> bool:
    return tensor.numel() >= _numel(tensor)


def _shares(out: Tensor, args: tuple) -> bool:
    return any(isinstance(a, Tensor) and _storage(a) == _storage(out) for a in args)


def _place(part: tuple[Box | None, Draw]) -> Box:
    return part[0] or ()


def build_on_meta(factory: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Draw]]:
    """The factory's module, built on meta, and what its initialiser would draw for every parameter."""
    return build(factory, torch.device("meta"))


def build(factory: Callable[[], nn.Module], device: torch.device) -> tuple[nn.Module, dict[str, Draw]]:
    """The factory's module on a device (on meta nothing is drawn), and what its initialiser draws for every
    parameter."""
    with torch.no_grad(), device, Draws() as draws:
        model = factory()
    return model, {name: draws[p] for name, p in model.named_parameters() if not nn.parameter.is_lazy(p)}
