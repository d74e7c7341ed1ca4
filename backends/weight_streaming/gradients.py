"""Gradients on their way to the store: summed over micro-batches in a buffer, then over executors, then spilled.

With one micro-batch a step in bf16, a gradient is spilled as it is; sums of several are fp32, as in the `cpu` backend.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from crystal.backends.adamw import gradient_norm
from crystal.backends.weight_streaming.reduce import sum_over_executors_
from crystal.backends.weight_streaming.store import Store
from crystal.backends.weight_streaming.store_layout import Piece
from crystal.backends.weight_streaming.stream import Stream


class Gradients:
    """Two buffers in turn: one is filled while the other is written. norms: of each whole tensor, by name."""

    def __init__(self, store: Store, stream: Stream):
        self.store, self.stream = store, stream
        self.norms: dict[str, Tensor] = {}
        self._side, self._written = 0, [None, None]

    def begin(self, piece: Piece, add: bool) -> Sums:
        """Sums for a piece's gradients; add: on top of what was spilled for it before."""
        self._side ^= 1
        if self._written[self._side] is not None:
            self._written[self._side].wait()
        plane = self.store.layout.gradient
        flat = self.stream.buffer.tensor(plane.dtype, self.stream.gradients_at[self._side], piece.numel)
        if add:
            self._last_write_of_all()
            self.store.read(piece, plane, 0, self._bytes(piece)).wait()
        return Sums(flat, piece.views(flat), set(piece.views(flat)) if add else set())

    def end(self, piece: Piece, sums: Sums, whole: bool) -> None:
        """Spill a piece's sums; whole: nothing will be added, so take them over executors and note the norms."""
        if whole:
            sum_over_executors_(sums.flat)
            for name, gradient in sums.views.items():
                self.norms[name] = gradient_norm(gradient)
        self.spill(piece)

    def spill(self, piece: Piece) -> None:
        """Queue the current buffer's way to the store, where gradients are kept there."""
        if not self.store.layout.spilled:
            return
        self._written[self._side] = self.store.write(piece, self.store.layout.gradient, 0, self._bytes(piece))

    def flush(self) -> None:
        """Return when everything is written."""
        self._last_write_of_all()
        self._written = [None, None]

    def _last_write_of_all(self) -> None:
        for ticket in self._written:
            if ticket is not None:
                ticket.wait()

    def _bytes(self, piece: Piece) -> memoryview:
        at = self.stream.gradients_at[self._side]
        return self.stream.buffer.bytes[at : at + self.store.layout.gradient.bytes(piece.numel)]


class Sums:
    """A piece's gradients while micro-batches add to them: views by name, and which have begun."""

    def __init__(self, flat: Tensor, views: dict[str, Tensor], begun: set[str]):
        self.flat, self.views, self.begun = flat, views, begun

    def add(self, name: str, gradient: Tensor) -> None:
        if name in self.begun:
            self.views[name].add_(gradient)
        else:
            self.views[name].copy_(gradient)
            self.begun.add(name)

    def leaves(self, weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """The weights as leaves whose gradients come here and are gone; names without `prefix`."""
        return {name.removeprefix(prefix): self._leaf(name, weight) for name, weight in weights.items()}

    def _leaf(self, name: str, weight: Tensor) -> Tensor:
        leaf = weight.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(self._collect(name))
        return leaf

    def _collect(self, name: str) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            self.add(name, leaf.grad)
            leaf.grad = None

        return hook
