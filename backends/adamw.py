"""AdamW in two formulas, over the plan's groups: torch's own, and that of Cerebras' software.

With g the gradient, p the weight, lambda the decay and t the step, both keep m = b1 m + (1 - b1) g and
v = b2 v + (1 - b2) g^2. torch (Loshchilov & Hutter 2019, eps added to the corrected root):

    p -= lr lambda p;  p -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Cerebras (cerebras.pytorch 2.10, optim/AdamBase.py, eps added to the raw root and the decay to the update):

    p -= lr (sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps) + lambda p)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from crystal.backends.config import OptimizerConfig


def adamw_cerebras_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, step: int, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float,
) -> None:  # fmt: skip
    """One update of a tensor, in place; all four fp32 and of one shape. step counts from 1."""
    m.lerp_(grad, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    correction = math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
    update = m.div(v.sqrt().add_(eps)).mul_(correction)
    p.sub_(update.add_(p, alpha=weight_decay).mul_(lr))


class CerebrasAdamW(Optimizer):
    """AdamW by Cerebras' formula, with torch's names of state: step, exp_avg, exp_avg_sq."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        if closure is not None:
            raise ValueError("closure: expected none, the step does not evaluate the loss")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                adamw_cerebras_(
                    p, p.grad, state["exp_avg"], state["exp_avg_sq"], step=int(state["step"].item()),
                    lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                )  # fmt: skip


def make_optimizer(config: OptimizerConfig, groups: list[dict]) -> Optimizer:
    """The optimizer that a run names, over `plan.parameter_groups`; its lr is set before each step."""
    if config.name == "adamw_cerebras":
        return CerebrasAdamW(groups, lr=0.0, betas=config.betas)
    return AdamW(groups, lr=0.0, betas=config.betas, fused=True)
