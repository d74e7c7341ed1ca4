"""A step's gradients as what they are made of: what went into each piece, and the gradient of what came out.

A block's gradient depends on its own weights, its inputs and the gradients of its outputs, and on nothing else. Kept
are the latter two, tokens x d_model numbers each; the block's gradient is made again, bit for bit, when the block is
updated. So a step of few tokens needs no room for gradients on disk, at the price of one more pass forward and back.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crystal.backends.base import MicroBatch
from crystal.errors import CheckpointError
from crystal.files import replacing
from crystal.kernels.crc32 import crc32

FILE = "boundaries.safetensors"


@dataclass
class Boundaries:
    """inputs: by block and for the head, of each micro-batch [B, T, D]; gradients: of each block's outputs and of the
    embedding's, likewise."""

    batches: list[MicroBatch]
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)

    def save(self, directory: Path) -> int:
        """Replace the directory's file; returns when this will last, with its CRC-32."""
        tensors = {
            f"{kind}/{name}/{i}": tensor.detach().contiguous()
            for kind, named in (("inputs", self.inputs), ("gradients", self.gradients))
            for name, found in named.items()
            for i, tensor in enumerate(found)
        }
        for i, batch in enumerate(self.batches):
            for key in fields(MicroBatch):
                tensors[f"batches/{key.name}/{i}"] = getattr(batch, key.name).contiguous().clone()
        with replacing(directory / FILE) as aside:
            save_file(tensors, aside)
            total = _sum_of(aside)
        return total


def _sum_of(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return crc32(content)


def load_boundaries(directory: Path, total: int | None) -> Boundaries:
    """What `save` wrote. total: its CRC-32, where it is known.

    Raises CheckpointError when it cannot be read or is not what was written.
    """
    path = directory / FILE
    try:
        if total is not None and (found := _sum_of(path)) != total:
            raise CheckpointError(
                f"{path}: expected CRC-32 {total:08x}, got {found:08x}: it is damaged, or of another step"
            )
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: an empty file
        raise CheckpointError(f"{path}: expected what a due update is made of: {error}") from None
    found: dict[str, dict[str, list[Tensor]]] = {"inputs": {}, "gradients": {}, "batches": {}}
    for key in sorted(tensors, key=lambda key: int(key.rpartition("/")[2])):
        kind, name, _ = key.split("/")
        found[kind].setdefault(name, []).append(tensors[key])
    columns = [found["batches"][key.name] for key in fields(MicroBatch)]
    return Boundaries([MicroBatch(*row) for row in zip(*columns, strict=True)], found["inputs"], found["gradients"])
