"""y = x W^T + b and its gradients on a CPU, each product by the library that was measured to be the faster here.

torch's own fp32 products are MKL's on x86, its bf16 products oneDNN's. Neither suits every processor: on AMD's Zen 5
oneDNN's fp32 is 2.4 times as fast as MKL's, on Intel MKL's weight gradient is twice as fast as oneDNN's, and where the
processor has no bf16 products oneDNN makes them at a fifth of the rate of fp32. `crystal.kernels.tuning` decides, by
operation, dtype and size; the candidates are here. A "widened" product of bf16 tensors is made in fp32 and rounded:
the sums of a bf16 product, which are fp32 too, in another order; by torch's own library, or oneDNN.

Shapes in names: N rows (tokens), I features in, O features out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import crystal.kernels.tuning as tuning
from crystal.kernels.dispatch import differentiable

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _widened(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(a.float(), b.float(), None if bias is None else bias.float()).to(a.dtype)


def _widened_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return _onednn(a.float(), b.float(), None if bias is None else bias.float()).to(a.dtype)


def _transposed_onednn(dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    """By oneDNN, whose fp32 weight gradient is faster with the wider side first."""
    if dy_NO.shape[1] >= x_NI.shape[1]:
        return _onednn(dy_NO.T, x_NI.T)
    return _onednn(x_NI.T, dy_NO.T).T.contiguous()


# of torch, oneDNN and fp32: x_NI W_OI^T + b
FORWARD = {"torch": F.linear, "onednn": _onednn, "widened": _widened, "widened_onednn": _widened_onednn}
# dy_NO W_OI
INPUT_GRADIENT = {
    "torch": torch.matmul,
    "onednn": lambda dy, weight_OI: _onednn(dy, weight_OI.T),
    "widened": lambda dy, weight_OI: (dy.float() @ weight_OI.float()).to(dy.dtype),
    "widened_onednn": lambda dy, weight_OI: _widened_onednn(dy, weight_OI.T),
}
# dy_NO^T x_NI, contiguous
WEIGHT_GRADIENT = {
    "torch": lambda dy_NO, x_NI: dy_NO.T @ x_NI,
    "transposed": lambda dy_NO, x_NI: (x_NI.T @ dy_NO).T.contiguous(),
    "onednn": _transposed_onednn,
    "widened": lambda dy_NO, x_NI: (dy_NO.float().T @ x_NI.float()).to(dy_NO.dtype),
    "widened_onednn": lambda dy_NO, x_NI: _transposed_onednn(dy_NO.float(), x_NI.float()).to(dy_NO.dtype),
}


def names_of(candidates: dict, dtype: torch.dtype) -> list[str]:
    """Those of an operation's candidates that this torch can run in a dtype."""
    wide = dtype != torch.float32
    can = {"onednn": _ONEDNN, "widened": wide, "widened_onednn": wide and _ONEDNN}
    return [name for name in candidates if can.get(name, True)]


def decided(*tensors: Tensor) -> bool:
    """Whether products of these are tuning's to decide: on a CPU, fp32 or bf16, and no DTensor or fake.

    DTensor has rules for torch's products alone.
    """
    return all(
        type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.dtype in tuning.NAMES and t.numel() > 0
        for t in tensors
    )


def _choice(operation: str, rows: Tensor, features_in: int, features_out: int) -> str:
    return tuning.product_choice(operation, rows.dtype, rows.numel() // rows.shape[-1], features_in, features_out)


def product(x: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times the transpose of the weight, plus bias [O]: [..., O]."""
    if not decided(x, weight_OI):
        return F.linear(x, weight_OI, bias)
    return FORWARD[_choice("forward", x, *weight_OI.shape[::-1])](x, weight_OI, bias)


def input_gradient(dy: Tensor, weight_OI: Tensor) -> Tensor:
    """dy [..., O] times the weight: [..., I]."""
    if not decided(dy, weight_OI):
        return dy @ weight_OI
    return INPUT_GRADIENT[_choice("input_gradient", dy, *weight_OI.shape[::-1])](dy, weight_OI)


def weight_gradient(dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    """The transpose of dy times x: [O, I], contiguous."""
    if not decided(dy_NO, x_NI):
        return dy_NO.T @ x_NI
    return WEIGHT_GRADIENT[_choice("weight_gradient", dy_NO, x_NI.shape[1], dy_NO.shape[1])](dy_NO, x_NI)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), [0] for what is not needed."""
    none = dy.new_empty(0)
    dy_rows = dy.flatten(0, -2)
    dx = input_gradient(dy, weight) if needs_x else none
    dweight = weight_gradient(dy_rows, x.flatten(0, -2)) if needs_weight else none
    return dx, dweight, dy_rows.sum(0) if needs_bias else none


def _forward_shapes(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward_shapes(dy, x, weight, needs_x, needs_weight, needs_bias):
    sizes = (x.shape, weight.shape, weight.shape[:1])
    needs = (needs_x, needs_weight, needs_bias)
    return tuple(dy.new_empty(size if need else 0) for size, need in zip(sizes, needs, strict=True))


def _save(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _gradients(ctx, backward, dy):
    needs = ctx.needs_input_grad
    found = backward(dy.contiguous(), *ctx.saved_tensors, needs[0], needs[1], ctx.has_bias and needs[2])
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


_linear = differentiable("linear", _forward, _backward, _save, _gradients, _forward_shapes, _backward_shapes)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times the transpose of weight [O, I], plus bias [O]: [..., O], one dtype throughout."""
    if x.dim() > 1 and decided(x, weight):
        return _linear(x, weight, bias)
    return F.linear(x, weight, bias)
