"""How far apart two right answers may lie: the one rule for numbers whose sums were made in different orders.

Another library, blocks of another size, wider vectors, fused multiply-adds, another number of threads: each rounds the
same sum in other places. Which of them a test meets is the processor's business, so no test may ask for its roundings.

The error model, with u the unit roundoff (2^-24 in fp32):

- A sum of n products, in any order, is within n u |x|.|y| of the exact one (Higham, Accuracy and Stability of
  Numerical Algorithms, 2002, section 3.1). Roundings are as good as independent, so sqrt(n) takes the place of n
  (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019).
- What a sum is made of was rounded too: along a path of several sums their lengths add up (Higham, lemma 3.3).
- |x|.|y| is the size that counts, and not the result: a loss of 0.01 that comes from logits near 30 is as uncertain as
  they are. Where x and y have mean zero, as weights and activations have, partial sums stay about as small as the
  largest result, which then serves as the size (Higham and Mary, Sharper Probabilistic Backward Error Analysis for
  Basic Linear Algebra Kernels with Random Data, 2020).

Bit equality is asked of two things only. One is the same operations on the same machine, in the same shapes and with
the same threads, on memory that starts at multiples of 64 bytes (MKL promises it for those alone, and a product of one
row does differ elsewhere). The other is native.c, which fixes the order of its sums.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crystal.zoo.config import ModelConfig

SAFETY = 8  # four standard deviations for each of the two that are compared


def tolerance(length: int, size: float | Tensor = 1.0, dtype: torch.dtype = torch.float32) -> float | Tensor:
    """How far apart two sums may lie.

    length: terms of the sum, or of all sums along a path; size: of what is compared, 1 for a relative tolerance;
    dtype: the one that sums are made in, which is fp32 for products of bf16 numbers too.
    """
    return SAFETY * torch.finfo(dtype).eps / 2 * math.sqrt(length) * size


def product_tolerance(x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same for each element of x @ y, whatever x and y hold."""
    return tolerance(x.shape[-1], x.detach().abs().double() @ y.detach().abs().double(), dtype)


def assert_near(found: Tensor, expected: Tensor, length: int, size: float | Tensor | None = None) -> None:
    """Every element within the tolerance. size: the largest magnitude that is expected, where none is given."""
    assert found.shape == expected.shape
    off = (found.detach().double() - expected.detach().double()).abs()
    allowed = tolerance(length, expected.detach().abs().max().item() if size is None else size)
    assert (off <= allowed).all(), f"off by {off.max():.1e}, {(off / allowed).max():.2g} times what is allowed"


def near(expected, length: int, size: float | None = None):
    """The same for a number, or a list or dict of them, each within the tolerance of its own size or of `size`."""
    if size is None:
        return pytest.approx(expected, rel=tolerance(length), abs=0)
    return pytest.approx(expected, rel=0, abs=tolerance(length, size))


def path_length(config: ModelConfig, tokens: int, step: int = 1) -> int:
    """Terms of all sums from token ids to logits, for rows of `tokens`; in training, to those of a step.

    Every step before it went forward and back, which is twice as far, to the weights that it uses.
    """
    attention = 3 * config.d_model + config.d_head + 2 * tokens  # norm, queries, output; scores; softmax, values
    mlp = 2 * config.d_model + config.d_ff  # norm, gate; down
    forward = config.n_layers * (attention + mlp) + 2 * config.d_model  # norm, head
    return (3 * step - 2) * forward
