"""The simple gradient noise scale: the batch size at which a step's gradient is as much noise as signal.

B_simple = tr(S) / |G|^2, S the covariance of one sequence's gradient and G the true gradient (McCandlish et al. 2018,
arXiv 1812.06162, appendix A.1). From the squared norms of gradients at two batch sizes b < B, unbiased:
    |G|^2 = (B |G_B|^2 - b |G_b|^2) / (B - b)        tr(S) = (|G_b|^2 - |G_B|^2) / (1/b - 1/B)
Here the large batch is a block of small ones, whose gradients are made one by one and averaged. It is of the raw
gradients, before clipping, moments and learning rates, and of the loss as the run weighs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from crystal.analysis.intervals import Z
from crystal.backends.base import MicroBatch
from crystal.zoo.decoder import Decoder


def noise_scale(
    decoder: Decoder, small: Sequence[MicroBatch], blocks: int, done: Callable[[int], None] = lambda _: None
) -> dict:
    """From small batches of equal size whose weights make each a mean over its own tokens; equally many go in a block.

    Returns {sequences, tokens, interval, small, large, gradient_square, noise, said}: B_simple in sequences and tokens
    with a jackknife interval over blocks in sequences, None where the gradient is too small to be told from noise.
    Gradients of the decoder's own weights are taken and left cleared. Raises ValueError for under two a block.
    """
    per_block = len(small) // blocks
    if blocks < 2 or per_block < 2:
        raise ValueError(f"expected at least 2 blocks of 2 batches, got {len(small)} batches in {blocks} blocks")
    b, seq_len = small[0].ids_BT.shape
    for p in decoder.parameters():
        p.requires_grad_(True)
    estimates = []
    for first in range(0, per_block * blocks, per_block):
        mean = [torch.zeros_like(p) for p in decoder.parameters()]
        squares = []
        for batch in small[first : first + per_block]:
            gradients = _gradients(decoder, batch)
            squares.append(_square(gradients))
            for total, gradient in zip(mean, gradients, strict=True):
                total.add_(gradient, alpha=1 / per_block)
            done(b)
        estimates.append(two_sizes(sum(squares) / per_block, _square(mean), b, b * per_block))
    for p in decoder.parameters():
        p.requires_grad_(False)
    return {"small": b, "large": b * per_block, "blocks": blocks} | _ratio(estimates, seq_len)


def two_sizes(small_square: float, large_square: float, b: float, B: float) -> tuple[float, float]:
    """(|G|^2, tr(S)) from mean squared norms of gradients at batch sizes b < B; either may come out below 0."""
    signal = (B * large_square - b * small_square) / (B - b)
    return signal, (small_square - large_square) / (1 / b - 1 / B)


def _ratio(estimates: Sequence[tuple[float, float]], seq_len: int) -> dict:
    """tr(S) over |G|^2, both means over blocks, for the ratio of one block has no mean."""
    signal, noise = (sum(column) / len(estimates) for column in zip(*estimates, strict=True))
    found = {"gradient_square": signal, "noise": noise, "sequences": None, "tokens": None, "interval": None}
    if signal <= 0 or noise <= 0:
        return found | {"said": "the gradient cannot be told from noise with so few rows"}
    value = noise / signal
    found |= {"sequences": value, "tokens": value * seq_len, "said": "measured"}
    n, left = len(estimates), []
    for i in range(n):
        rest = [e for j, e in enumerate(estimates) if j != i]
        without_signal, without_noise = (sum(column) / (n - 1) for column in zip(*rest, strict=True))
        if without_signal <= 0 or without_noise <= 0:
            return found | {"said": "measured, but hangs on one block: too few rows for an interval"}
        left.append(math.log(without_noise / without_signal))
    middle = sum(left) / n
    error = math.sqrt((n - 1) / n * sum((x - middle) ** 2 for x in left))
    return found | {"interval": [value * math.exp(-Z * error), value * math.exp(Z * error)]}


def _gradients(decoder: Decoder, batch: MicroBatch) -> list[Tensor]:
    device = decoder.embed.weight.device
    parts = (batch.ids_BT, batch.labels_BT, batch.weights_BT, batch.documents_BT)
    loss, _ = decoder.loss(*(part.to(device) for part in parts))
    loss.backward()
    gradients = []
    for p in decoder.parameters():
        gradients.append(torch.zeros_like(p) if p.grad is None else p.grad)
        p.grad = None
    return gradients


def _square(tensors: Sequence[Tensor]) -> float:
    return sum(t.double().square().sum().item() for t in tensors)
