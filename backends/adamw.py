"""AdamW in two formulas, over the plan's groups: torch's own, and that of Cerebras' software.

With g the gradient, p the weight, lambda the decay and t the step, both keep m = b1 m + (1 - b1) g and
v = b2 v + (1 - b2) g^2. torch (Loshchilov & Hutter 2019, eps added to the corrected root):

    p -= lr lambda p;  p -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Cerebras (cerebras.pytorch 2.10, optim/AdamBase.py, eps added to the raw root and the decay to the update):

    p -= lr (sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps) + lambda p)

`cpu` and `weight_streaming` update by `adamw_`, tensor by tensor or chunk by chunk; `cuda` by an Optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

import crystal.kernels.native as native
from crystal.backends.cast import round_to_bf16
from crystal.backends.config import OptimizerConfig


def native_numbers(
    config: OptimizerConfig, step: int, lr: float, eps: float, weight_decay: float, scale: float | None
) -> tuple[float, ...]:
    """Either formula as the numbers of `native.c`'s: with C = 1 - b1^t and R = sqrt(1 - b2^t), m's factor is lr / C
    over sqrt(v) / R for torch, and lr R / C over sqrt(v) for Cerebras."""
    beta1, beta2 = config.betas
    by, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    if config.name == "adamw_cerebras":
        by, root = by * root, 1.0
    return (1.0 if scale is None else scale, 1 - beta1, beta2, 1 - beta2, by, root, eps, lr * weight_decay)


@torch.no_grad()
def adamw_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, config: OptimizerConfig, step: int, lr: float, eps: float,
    weight_decay: float, scale: float | None = None, rounded: Tensor | None = None,
) -> None:  # fmt: skip
    """One update of a tensor, in place, by the formula that the config names; on a CPU one pass of `native.c`.

    p, m and v: fp32, contiguous; grad: fp32 or bf16 of the same shape, taken times `scale`; rounded: bf16, becomes p's
    rounding. step counts from 1. Element by element, so that parts of a tensor give what the whole would.
    """
    grad = grad.contiguous()
    if native.use_native(grad):
        native.adamw(p, m, v, grad, rounded, native_numbers(config, step, lr, eps, weight_decay, scale))
        return
    grad = grad.float() if scale is None else grad.float() * scale
    numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    if config.name == "adamw_cerebras":
        adamw_cerebras_(p, grad, m, v, step=step, betas=config.betas, **numbers)
    else:
        steps, (beta1, beta2) = [torch.tensor(float(step))], config.betas
        torch._fused_adamw_(
            [p], [grad], [m], [v], [], steps, beta1=beta1, beta2=beta2, amsgrad=False, maximize=False, **numbers
        )
    if rounded is not None:
        round_to_bf16(p, rounded)


def gradient_norm(gradient: Tensor) -> Tensor:
    """L2 norm of a tensor of fp32 or bf16, in fp32: one that `cpu` and `weight_streaming` find alike."""
    if native.use_native(gradient) and gradient.is_contiguous():
        return torch.tensor(native.square_sum(gradient)).sqrt_()
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


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
