"""Rotary position embedding on the first `rotary_dim` dimensions of each head, in both pairings that are in use.

`half`: dimension i turns with i + rotary_dim/2 (GPT-NeoX, LLaMA in Hugging Face form).
`interleaved`: dimension 2i turns with 2i + 1 (GPT-J; CrystalCoder).
Both turn pair i at position t by the angle t * base^(-2i/rotary_dim) (RoFormer, Su et al. 2021, eq. 15).
"""

import torch
from torch import Tensor


def rope_table(positions: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle, fp32 [T, rotary_dim/2], for integer positions [T].

    Frequencies and angles stay in fp32: bf16 angles are off by whole turns from a few hundred positions on.
    Frequencies are rounded as 1 / base^(2i/d), the published order of operations in both families: at position
    2,000 the other order is off by 6e-5, which logits show.
    """
    pair = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device)
    angle_TP = positions.float()[:, None] * (1.0 / base ** (pair / rotary_dim))
    return angle_TP.cos(), angle_TP.sin()


def rope(x_BHTD: Tensor, cos_TP: Tensor, sin_TP: Tensor, style: str) -> Tensor:
    """Turn the first 2P of the D dimensions of every head; the rest pass through. Returns x's dtype.

    x_BHTD: any float dtype; the turn itself is computed in fp32.
    """
    rotary_dim = 2 * cos_TP.shape[-1]
    turned, rest = x_BHTD[..., :rotary_dim].float(), x_BHTD[..., rotary_dim:]
    if style == "interleaved":
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos_TP - b * sin_TP, b * cos_TP + a * sin_TP), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos_TP - b * sin_TP, b * cos_TP + a * sin_TP), -1)
    out = out.to(x_BHTD.dtype)
    return out if rest.shape[-1] == 0 else torch.cat((out, rest), -1)
