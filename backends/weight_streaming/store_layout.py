"""Where every tensor lies in the store: pieces, planes, slots and their sizes in bytes.

A piece is what passes through the device at once: the embedding, a block, the head. It is one run of elements, each
tensor at a multiple of 64 of them; matrices first, so that q, k and v (and gate and up) lie side by side. A plane holds
one kind of number for all of a piece's elements. A slot is room for all planes of a piece; there is one slot more than
pieces of a size, so that an updated piece is written beside its old self.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from crystal.mup.plan import Plan, TensorPlan

PAGE = 4096  # O_DIRECT wants offsets, sizes and memory in pages
ALIGN = 64  # elements; the vector loops of an update cut no tensor's end differently than in one piece
SCALED = 256  # elements that share a scale in the int8 formats


@dataclass(frozen=True)
class Plane:
    """One number for every `per` elements of a piece."""

    name: str
    dtype: torch.dtype
    per: int = 1

    def bytes(self, numel: int) -> int:
        """Room for `numel` elements' numbers, in whole pages."""
        return -(-numel // self.per * self.dtype.itemsize // PAGE) * PAGE


HIGH, LOW = Plane("high", torch.int16), Plane("low", torch.int16)
MOMENTS = {
    "fp32": (Plane("m", torch.float32), Plane("v", torch.float32)),
    "bf16": (Plane("m", torch.bfloat16), Plane("v", torch.bfloat16)),
    "int8": (
        Plane("m", torch.int8),
        Plane("v", torch.uint8),
        Plane("m_scale", torch.int32, SCALED),
        Plane("v_scale", torch.int32, SCALED),
    ),
}


@dataclass(frozen=True)
class Place:
    """A tensor's place in its piece, in elements."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.numel


@dataclass(frozen=True)
class Piece:
    """Tensors that pass through the device together; numel counts the gaps between them too."""

    name: str
    places: tuple[Place, ...]
    numel: int

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """name → its part of `flat` [numel], in shape."""
        return {p.name: flat[p.start : p.stop].view(p.shape) for p in self.places}


@dataclass(frozen=True)
class Layout:
    """All pieces in forward order, the planes of a slot, and the gradients' plane, which has room if spilled."""

    pieces: tuple[Piece, ...]
    planes: tuple[Plane, ...]
    gradient: Plane
    spilled: bool = True

    def __getitem__(self, name: str) -> Piece:
        return next(piece for piece in self.pieces if piece.name == name)

    def slots(self) -> Iterator[tuple[int, list[Piece]]]:
        """(elements, pieces of that size), sizes in order of appearance: each has a slot more than pieces."""
        for numel in dict.fromkeys(piece.numel for piece in self.pieces):
            yield numel, [piece for piece in self.pieces if piece.numel == numel]

    def slot_bytes(self, numel: int) -> int:
        return sum(plane.bytes(numel) for plane in self.planes)

    @property
    def fingerprint(self) -> str:
        """Of where each tensor's numbers lie, and of what kind they are: two layouts with one have the same bytes."""
        places = [[piece.name, piece.numel, [asdict(place) for place in piece.places]] for piece in self.pieces]
        planes = [[plane.name, str(plane.dtype), plane.per] for plane in (*self.planes, self.gradient)]
        return hashlib.sha256(json.dumps([places, planes]).encode()).hexdigest()[:16]

    @property
    def store_bytes(self) -> int:
        return sum(self.slot_bytes(numel) * (len(pieces) + 1) for numel, pieces in self.slots())

    @property
    def gradient_bytes(self) -> int:
        return sum(self.gradient.bytes(piece.numel) for piece in self.pieces) if self.spilled else 0


def layout(plan: Plan, moments: str, gradients: torch.dtype, spilled: bool = True) -> Layout:
    """The layout of a model's store. moments: fp32, bf16 or int8; gradients: bfloat16 or float32."""
    tied = all(row.tensor != "head.weight" for row in plan.tensors)
    rows: dict[str, list[TensorPlan]] = {}
    for row in plan.tensors:
        parts = row.tensor.split(".")
        piece = ".".join(parts[:2]) if parts[0] == "blocks" else "embed" if tied or parts[0] == "embed" else "head"
        rows.setdefault(piece, []).append(row)
    pieces = tuple(_piece(name, sorted(found, key=lambda r: -len(r.shape))) for name, found in rows.items())
    return Layout(pieces, (HIGH, LOW, *MOMENTS[moments]), Plane("gradient", gradients), spilled)


def _piece(name: str, rows: list[TensorPlan]) -> Piece:
    places, end = [], 0
    for row in rows:
        places.append(Place(row.tensor, row.shape, end))
        end += -(-math.prod(row.shape) // ALIGN) * ALIGN
    return Piece(name, tuple(places), -(-end // PAGE) * PAGE)
