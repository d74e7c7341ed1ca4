"""Numbers in planes: fp32 as a high and a low half, and AdamW's moments in fp32, bf16 or 8 bits.

An fp32 weight is its bf16 rounding, half-up (`crystal.backends.cast`), and what is left of its bits: a signed 16-bit
remainder. Nothing is lost, and compute in bf16 reads the high plane alone.

An 8-bit moment is a small float under the largest of 256 neighbours, whose fp32 bits are kept: m has a sign, 4 bits of
exponent and 3 of mantissa, v 5 and 3; so they reach 2^-16 and 2^-32 of the largest. Rounding is by chance, or a moment
that decays by less than a step would never decay: the weight's own 16 low bits are the random number, which costs
nothing and is the same after a restart. What is given up: a single moment is up to 12% off, evenly either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crystal.backends.weight_streaming.store_layout import SCALED


def join(high: Tensor, low: Tensor, out: Tensor) -> Tensor:
    """fp32 `out` from its two int16 halves, all of one length."""
    bits = out.view(torch.int32)
    bits.copy_(high).bitwise_left_shift_(16).add_(low)
    return out


def split(source: Tensor, high: Tensor, low: Tensor, scratch: Tensor) -> None:
    """fp32 `source` into two int16 halves. scratch: int32 of the same length. Finite values only."""
    bits = source.view(torch.int32)
    torch.add(bits, 0x8000, out=scratch).bitwise_right_shift_(16)
    high.copy_(scratch)
    torch.sub(bits, scratch.bitwise_left_shift_(16), out=scratch)
    low.copy_(scratch)


def decode_m(planes: dict[str, Tensor], out: Tensor) -> None:
    """Fill fp32 `out` with first moments, stored as the planes' dtypes say."""
    if "m_scale" not in planes:
        out.copy_(planes["m"])
        return
    offset = _offset(planes["m_scale"], 127)
    signed = planes["m"].to(torch.int32)
    torch.abs(signed, out=out.view(torch.int32))
    _rows(out).add_(offset).bitwise_left_shift_(_CUT)
    out.view(-1, SCALED).sub_(_floor(offset))
    out.mul_(signed.sign_())


def decode_v(planes: dict[str, Tensor], out: Tensor) -> None:
    """The same for second moments."""
    out.view(torch.int32 if "v_scale" in planes else torch.float32).copy_(planes["v"])
    if "v_scale" in planes:
        _rows(out).add_(_offset(planes["v_scale"], 255)).bitwise_left_shift_(_CUT)


def encode_m(m: Tensor, planes: dict[str, Tensor], chance: Tensor) -> None:
    """Store fp32 first moments (overwritten). chance: int16 at random, what rounding to 8 bits is decided by."""
    if "m_scale" not in planes:
        planes["m"].copy_(m)
        return
    sign = m.view(torch.int32).bitwise_right_shift(31).bitwise_or_(1)
    torch.amax(_rows(m.abs_()), 1, out=planes["m_scale"])
    offset = _offset(planes["m_scale"], 127)
    m.view(-1, SCALED).add_(_floor(offset))
    code = m.view(torch.int32).add_(_below(chance)).bitwise_right_shift_(_CUT)
    code.view(-1, SCALED).sub_(offset).clamp_(max=127)
    planes["m"].copy_(code.mul_(sign))


def encode_v(v: Tensor, planes: dict[str, Tensor], chance: Tensor) -> None:
    """The same for second moments."""
    if "v_scale" not in planes:
        planes["v"].copy_(v)
        return
    torch.amax(_rows(v), 1, out=planes["v_scale"])
    code = v.view(torch.int32).add_(_below(chance)).bitwise_right_shift_(_CUT)
    # 0 stands for the smallest, not for zero: m / sqrt(v) must not be divided by what was rounded away
    code.view(-1, SCALED).sub_(_offset(planes["v_scale"], 255)).clamp_(0, 255)
    planes["v"].copy_(code)


_CUT = 20  # of fp32's 23 bits of mantissa, those that 8 bits do not hold


def _below(chance: Tensor) -> Tensor:
    """Added to a number's bits, it carries into the code as often as the bits cut off are large."""
    return chance.to(torch.int32).add_(1 << 15).bitwise_left_shift_(4)


def _rows(x: Tensor) -> Tensor:
    """The bits of x, a row for each scale; of numbers that are not negative they sort as the numbers do."""
    return x.view(torch.int32).view(-1, SCALED)


def _offset(scale: Tensor, top: int) -> Tensor:
    """What the code of each row's largest number exceeds `top` by [rows, 1]."""
    return scale.bitwise_right_shift(_CUT).sub_(top).clamp_(min=0)[:, None]


def _floor(offset: Tensor) -> Tensor:
    """The number whose code is 0: m is stored with it added, so that 0 is 0 and small ones fade evenly."""
    return offset.bitwise_left_shift(_CUT).view(torch.float32)
