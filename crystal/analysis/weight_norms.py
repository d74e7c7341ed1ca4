"""How large weights are, role by role, and how far they moved since the checkpoint before: a tensor at a time."""

from __future__ import annotations

import math

from torch import Tensor

from crystal.checkpoint import Checkpoint
from crystal.inference.load import model_config_of
from crystal.zoo.build import plan_for


def weight_norms(opened: Checkpoint, before: Checkpoint | None) -> dict[str, dict]:
    """Of every role of the parameter plan: {tensors, numbers, rms, moved}.

    rms: root of the mean square of its weights. moved: the norm of all its changes since `before` over the norm that it
    had there; None for the first checkpoint.
    """
    roles = {tensor.tensor: tensor.role for tensor in plan_for(model_config_of(opened)).tensors}
    sums: dict[str, list[float]] = {}
    counts: dict[str, list[int]] = {}
    for name, now in opened.tensors("model"):
        own, count = sums.setdefault(roles[name], [0.0, 0.0, 0.0]), counts.setdefault(roles[name], [0, 0])
        own[0] += _square(now)
        count[0] += 1
        count[1] += now.numel()
        if before is not None:
            whole = {name: tuple(slice(0, size) for size in now.shape)}
            ((_, then),) = before.tensors("model", whole)
            own[1] += _square(now - then)
            own[2] += _square(then)
    return {
        role: {
            "tensors": counts[role][0],
            "numbers": counts[role][1],
            "rms": math.sqrt(total / counts[role][1]),
            "moved": math.sqrt(moved / then) if before is not None and then else None,
        }
        for role, (total, moved, then) in sorted(sums.items())
    }


def _square(tensor: Tensor) -> float:
    return tensor.double().square().sum().item()
