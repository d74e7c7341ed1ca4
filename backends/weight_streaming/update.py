"""One optimizer update of a run of elements: planes in, planes and compute weights out.

Every operation works element by element, so that a chunk's result does not depend on where chunks are cut, and is
what the `cpu` backend's whole-tensor update gives, bit for bit, with fp32 moments.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import crystal.kernels.native as native
from crystal.backends.adamw import adamw_, native_numbers
from crystal.backends.config import OptimizerConfig
from crystal.backends.weight_streaming.planes import decode_m, decode_v, encode_m, encode_v, join, split
from crystal.backends.weight_streaming.store import Update
from crystal.backends.weight_streaming.store_layout import Piece
from crystal.mup.plan import Plan

STRETCH = 1 << 19  # elements at a time: what an update touches stays in the cache


class Updater:
    """AdamW by the plan's groups, over chunks of pieces."""

    def __init__(self, plan: Plan, optimizer: OptimizerConfig):
        self.optimizer = optimizer
        keys = ("lr_multiplier", "weight_decay", "eps")
        self.groups = [
            {"name": name, "tensors": [row.tensor for row in rows]} | {key: getattr(rows[0], key) for key in keys}
            for name, rows in plan.groups().items()
        ]
        self._group_of = {tensor: i for i, group in enumerate(self.groups) for tensor in group["tensors"]}
        self._fp32 = {name: torch.empty(STRETCH) for name in ("p", "m", "v")}
        self._int32 = torch.empty(STRETCH, dtype=torch.int32)

    @torch.no_grad()
    def __call__(self, piece: Piece, begin: int, planes: dict[str, Tensor], compute: Tensor, update: Update) -> None:
        """Update elements begin … of a piece in place.

        planes: high, low, the moments' and gradient, each of this chunk alone; compute: bf16 or fp32, as many
        elements, is filled with the new weights.
        """
        for start in range(0, compute.numel(), STRETCH):
            stop = min(start + STRETCH, compute.numel())
            part = {name: _slice(t, start, stop, compute.numel()) for name, t in planes.items()}
            p, m, v = (self._fp32[name][: stop - start] for name in ("p", "m", "v"))
            exact = part["m"].dtype == torch.float32
            if exact:
                m, v = part["m"], part["v"]
            if update.optimizer_step == 1:
                m.zero_()
                v.zero_()
            elif not exact:
                decode_m(part, m)
                decode_v(part, v)
            high, low, gradient, into = part["high"], part["low"], part["gradient"], compute[start:stop]
            runs = self._runs(piece, begin + start, stop - start, update)
            if compute.dtype == torch.bfloat16 and native.use_native(gradient):
                for run, numbers in runs:
                    tensors = (t[run] for t in (high, low, m, v, gradient, into))
                    native.adamw_halves(*tensors, native_numbers(**numbers))
            else:
                join(high, low, p)
                for run, numbers in runs:
                    adamw_(p[run], gradient[run], m[run], v[run], **numbers)
                split(p, high, low, self._int32[: stop - start])
                into.copy_(p if compute.dtype == torch.float32 else high.view(torch.bfloat16))
            if not exact:
                encode_m(m, part, part["low"])
                encode_v(v, part, part["low"])

    def _runs(self, piece: Piece, begin: int, count: int, update: Update) -> Iterator[tuple[slice, dict]]:
        """The parts of elements begin … begin + count that belong to tensors, each with its group's numbers."""
        for place in piece.places:
            start, stop = max(place.start - begin, 0), min(place.stop - begin, count)
            if start < stop:
                group = self.groups[self._group_of[place.name]]
                yield (
                    slice(start, stop),
                    {
                        "config": self.optimizer,
                        "step": update.optimizer_step,
                        "lr": update.lr * group["lr_multiplier"],
                        "eps": group["eps"],
                        "weight_decay": group["weight_decay"],
                        "scale": update.scale,
                    },
                )


def _slice(plane: Tensor, start: int, stop: int, numel: int) -> Tensor:
    """Elements start … stop of a chunk of `numel`, whatever a number of the plane stands for."""
    per = numel // plane.numel()
    return plane[start // per : stop // per]
