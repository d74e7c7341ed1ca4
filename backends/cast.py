"""fp32 → bf16, the one cast that `cpu` and `weight_streaming` share.

Rounding is half-up on the magnitude's bits, hi = (bits + 0x8000) >> 16: with it, fp32 is exactly hi plus a signed
16-bit remainder, so that streaming can hold fp32 weights as two planes and read only the high one.
"""

import torch
from torch import Tensor


def round_to_bf16(source: Tensor, out: Tensor) -> Tensor:
    """Write fp32 `source` into bf16 `out` of the same shape; finite values only."""
    bits = source.view(torch.int32).add(0x8000).bitwise_right_shift_(16)
    out.view(torch.int16).copy_(bits)
    return out
