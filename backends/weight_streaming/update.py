"""One optimizer update of a run of elements: planes in, planes and compute weights out.

Every operation works element by element, so that a chunk's result does not depend on where chunks are cut, and is
what the `cpu` backend's whole-tensor update gives, bit for bit, with fp32 moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crystal.backends.adamw import adamw_cerebras_
from crystal.backends.config import OptimizerConfig
from crystal.backends.weight_streaming.layout import Piece
from crystal.backends.weight_streaming.planes import decode_m, decode_v, encode_m, encode_v, join, split
from crystal.backends.weight_streaming.store import Update
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
        self._fp32 = {name: torch.empty(STRETCH) for name in ("p", "g", "m", "v")}
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
            p, g, m, v = (self._fp32[name][: stop - start] for name in ("p", "g", "m", "v"))
            join(part["high"], part["low"], p)
            g.copy_(part["gradient"])
            if update.scale is not None:
                g.mul_(update.scale)
            exact = part["m"].dtype == torch.float32
            if exact:
                m, v = part["m"], part["v"]
            if update.optimizer_step == 1:
                m.zero_()
                v.zero_()
            elif not exact:
                decode_m(part, m)
                decode_v(part, v)
            self._adamw(piece, begin + start, p, g, m, v, update)
            split(p, part["high"], part["low"], self._int32[: stop - start])
            if not exact:
                encode_m(m, part, part["low"])
                encode_v(v, part, part["low"])
            if compute.dtype == torch.float32:
                compute[start:stop] = p
            else:
                compute[start:stop].view(torch.int16).copy_(part["high"])

    def _adamw(self, piece: Piece, begin: int, p: Tensor, g: Tensor, m: Tensor, v: Tensor, update: Update) -> None:
        """The formula, on those parts of elements begin … that belong to tensors, group by group."""
        runs: dict[int, list[slice]] = {}
        for place in piece.places:
            start, stop = max(place.start - begin, 0), min(place.stop - begin, p.numel())
            if start < stop:
                runs.setdefault(self._group_of[place.name], []).append(slice(start, stop))
        for number, slices in runs.items():
            group = self.groups[number]
            numbers = {"lr": update.lr * group["lr_multiplier"], "weight_decay": group["weight_decay"]}
            columns = [[t[s] for s in slices] for t in (p, g, m, v)]
            if self.optimizer.name == "adamw_cerebras":
                for tensors in zip(*columns, strict=True):
                    adamw_cerebras_(
                        *tensors, step=update.optimizer_step, betas=self.optimizer.betas, eps=group["eps"], **numbers
                    )
            else:
                _fused_adamw(*columns, update.optimizer_step, self.optimizer.betas, group["eps"], **numbers)


def _fused_adamw(
    p: Sequence[Tensor], g: Sequence[Tensor], m: Sequence[Tensor], v: Sequence[Tensor], step: int,
    betas: tuple[float, float], eps: float, lr: float, weight_decay: float,
) -> None:  # fmt: skip
    """The kernel behind torch.optim.AdamW(fused=True)."""
    steps = [torch.tensor(float(step)) for _ in p]
    torch._fused_adamw_(
        p, g, m, v, [], steps, lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def _slice(plane: Tensor, start: int, stop: int, numel: int) -> Tensor:
    """Elements start … stop of a chunk of `numel`, whatever a number of the plane stands for."""
    per = numel // plane.numel()
    return plane[start // per : stop // per]
