import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight; x [..., d], weight [d]; normalised in fp32, then rounded (LLaMA's order)."""
    x32 = x.float()
    normal = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight
