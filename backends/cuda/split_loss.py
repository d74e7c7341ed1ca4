"""The loss head with its weight split over processes by words: tensor parallelism's share of the last matrix.

Each process has the logits of its own words. For a token with logits z, with m = max z over all processes,

    nll = log(sum exp(z - m)) + m - z[label],    d nll / dz = exp(z - m) / sum exp(z - m) - onehot(label),

so two all-reduces of a number or two per token are all that is exchanged, and one of the gradient of x; with sequence
parallelism x is gathered, and that one is a reduce-scatter. As in `kernels/linear_cross_entropy.py`, gradients are made
in the forward pass, a few hundred tokens at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crystal.backends.cuda.tensor_parallel import Split, all_reduced, gathered, reduced
from crystal.kernels.linear_cross_entropy import CHUNK, CUDA_CHUNK, scaled


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_WD, labels_N, weights_N, scale, split):
        needs_x, needs_w = ctx.needs_input_grad[:2]
        if split.sequence:
            x_ND = gathered(x_ND[None], split)[0]
        own_N = labels_N - split.rank * weight_WD.shape[0]
        has_N = (own_N >= 0) & (own_N < weight_WD.shape[0])
        own_N = own_N.clamp(0, weight_WD.shape[0] - 1)
        nll_N = torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device)
        dx_ND = torch.zeros_like(x_ND) if needs_x else None
        dw_WD = torch.zeros(weight_WD.shape, dtype=torch.float32, device=x_ND.device) if needs_w else None
        chunk = CUDA_CHUNK if x_ND.is_cuda else CHUNK
        for begin in range(0, x_ND.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            word_C1, has_C = own_N[rows, None], has_N[rows].float()
            z_CW = (x_ND[rows] @ weight_WD.T).float().mul_(scale)
            max_C = all_reduced(z_CW.amax(1), "max", split)
            label_C = (z_CW.gather(1, word_C1).squeeze(1) - max_C) * has_C
            exp_CW = z_CW.sub_(max_C[:, None]).exp_()
            sums_2C = all_reduced(torch.stack([exp_CW.sum(1), label_C]), "sum", split)
            nll_N[rows] = sums_2C[0].log() - sums_2C[1]
            if not (needs_x or needs_w):
                continue
            grad_CW = exp_CW.div_(sums_2C[0, :, None])
            grad_CW.scatter_add_(1, word_C1, -has_C[:, None])
            grad_CW = grad_CW.mul_(weights_N[rows, None] * scale).to(x_ND.dtype)
            if needs_x:
                torch.mm(grad_CW, weight_WD, out=dx_ND[rows])
            if needs_w:
                dw_WD += grad_CW.T @ x_ND[rows]
        if needs_x:
            dx_ND = reduced(dx_ND[None], split)[0]
        ctx.save_for_backward(dx_ND, dw_WD)
        ctx.weight_dtype = weight_WD.dtype
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx, dloss, _):
        return *scaled(*ctx.saved_tensors, dloss, ctx.weight_dtype), None, None, None, None


def split_cross_entropy(
    x_ND: Tensor, weight_WD: Tensor, labels_N: Tensor, weights_N: Tensor, scale: float, split: Split
) -> tuple[Tensor, Tensor]:
    """`kernels.linear_cross_entropy`, each process of `split` holding its W = V / processes rows of the weight.

    x_ND, labels and weights are the same on every process; so are the results (loss, nll_N) and the gradient of x.
    With sequence parallelism x, and its gradient, is [N / processes, D]: a process' own run of the N tokens.
    """
    return _SplitCrossEntropy.apply(x_ND, weight_WD, labels_N, weights_N, scale, split)
