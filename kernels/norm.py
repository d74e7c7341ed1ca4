"""LayerNorm and RMSNorm over the last dimension, statistics in fp32 whatever the input's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias; x [..., d], weight and bias [d], in x's dtype.

    torch's CPU and CUDA kernels keep mean and variance in fp32 for bf16 inputs.
    """
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight; x [..., d], weight [d]; normalised in fp32, then rounded (LLaMA's order)."""
    x32 = x.float()
    normal = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight
