"""Reads what an initialiser draws, without drawing: on the meta device, at any size, in seconds.

Code that fills a tensor comes down to a handful of in-place operations (normal_, uniform_, fill_, …). A dispatch
mode watches them and keeps for every storage the distribution that its last writer left there, so the sigma of a
7B's tensor is read off the call that would draw it. Whatever it cannot follow it calls `unknown`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Draw:
    """A tensor's distribution. kind: normal | uniform | constant | unknown | none (never written).

    std: standard deviation, of the parent normal where `cut` (a bound in absolute units) truncates it; mean: its
    centre, or the constant.
    """

    kind: str
    std: float = 0.0
    mean: float = 0.0
    cut: float | None = None

    def __str__(self) -> str:
        if self.kind == "constant":
            return f"{self.mean:g}"
        if self.kind in ("unknown", "none"):
            return self.kind
        return f"{self.kind} {self.std:.4g}" + (f" cut {self.cut:.4g}" if self.cut else "")


UNKNOWN, NONE = Draw("unknown"), Draw("none")

# torch's initialisers that do nothing on meta, so that the mode would not see them
_TRUNCATED, _SILENT = "_no_grad_trunc_normal_", ("orthogonal_", "dirac_", "eye_", "sparse_")

# Operations whose result holds the same values: views share the storage, these copy it.
_COPIES = {"clone", "_to_copy", "contiguous", "detach", "lift_fresh", "alias"}


class Draws(TorchDispatchMode):
    """`with Draws() as draws: model = factory()`; then `draws[tensor]`."""

    def __init__(self):
        super().__init__()
        self.found: dict[int, Draw] = {}
        self.alive: list[Tensor] = []  # a storage that is freed could hand its address to another

    def __getitem__(self, tensor: Tensor) -> Draw:
        return self.found.get(_storage(tensor), NONE)

    def set(self, tensor: Tensor, draw: Draw) -> None:
        self.found[_storage(tensor)] = draw
        self.alive.append(tensor)

    def __enter__(self) -> Draws:
        self.torchs = {name: getattr(init, name) for name in (_TRUNCATED, *_SILENT)}
        setattr(init, _TRUNCATED, self._truncated)
        for name in _SILENT:
            setattr(init, name, self._unread)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        for name, function in self.torchs.items():
            setattr(init, name, function)
        super().__exit__(*error)

    def _truncated(self, tensor, mean, std, a, b, generator=None) -> Tensor:
        self.set(tensor, Draw("normal", std, mean, min(b - mean, mean - a)))
        return tensor

    def _unread(self, tensor, *args, **kwargs) -> Tensor:
        self.set(tensor, UNKNOWN)
        return tensor

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
            case "fill" | "full" | "full_like":
                self.set(out, Draw("constant", mean=float(numbers[-1])) if numbers else UNKNOWN)
            case "mul" | "div" if first is not None and len(numbers) == 1:
                c = numbers[0] if name.startswith("mul") else 1 / numbers[0]
                old = self[first]
                cut = None if old.cut is None else old.cut * abs(c)
                self.set(out, replace(old, std=old.std * abs(c), mean=old.mean * c, cut=cut))
            case "add" | "sub" if first is not None and len(numbers) == 1:
                shift = numbers[0] if name.startswith("add") else -numbers[0]
                self.set(out, replace(self[first], mean=self[first].mean + shift))
            case "copy" if in_place:
                self.set(out, self[args[1]])
            case other if other in _COPIES and first is not None:
                if _storage(out) != _storage(first):
                    self.set(out, self[first])
            case _ if in_place or (first is not None and self[first] is not NONE and not _shares(out, args)):
                self.set(out, UNKNOWN)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _shares(out: Tensor, args: tuple) -> bool:
    return any(isinstance(a, Tensor) and _storage(a) == _storage(out) for a in args)


@contextmanager
def _on_meta() -> Iterator[Draws]:
    with torch.no_grad(), torch.device("meta"), Draws() as draws:
        yield draws


def build_on_meta(factory: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Draw]]:
    """The factory's module, built on meta, and what its initialiser would draw for every parameter."""
    with _on_meta() as draws:
        model = factory()
    return model, {name: draws[p] for name, p in model.named_parameters()}
