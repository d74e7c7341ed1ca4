"""The loss head in one operator: project, score, differentiate, a few hundred tokens at a time.

The logits of a whole batch are the largest tensor of a training step (8,192 tokens x 32,032 words in fp32 are
1 GB) and nobody needs them twice. So for each chunk of tokens the forward pass makes the logits, reads off the
loss, and turns them in place into their gradient softmax - onehot, which is at once multiplied back into the
gradients of x and weight. Backward only scales these. On a CPU this is 1.1x (fp32) to 1.2x (bf16) faster than
logits followed by cross_entropy, because a chunk stays in the cache.
"""

import torch
from torch import Tensor

CHUNK = 512  # tokens; 256 and 512 measured equal


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_VD, labels_N, weights_N, logits_scale):
        needs_x, needs_w = ctx.needs_input_grad[:2]
        dx_ND = torch.empty_like(x_ND) if needs_x else None
        # fp32: the head's gradient is a sum over every token of the batch
        dw_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=x_ND.device) if needs_w else None
        nll_N = torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device)
        for begin in range(0, x_ND.shape[0], CHUNK):
            rows = slice(begin, begin + CHUNK)
            logits_CV = (x_ND[rows] @ weight_VD.T).float().mul_(logits_scale)
            label_C1 = labels_N[rows, None]
            lse_C1 = torch.logsumexp(logits_CV, -1, keepdim=True)
            nll_N[rows] = (lse_C1 - logits_CV.gather(1, label_C1)).squeeze(1)
            if not (needs_x or needs_w):
                continue
            grad_CV = logits_CV.sub_(lse_C1).exp_()
            grad_CV.scatter_add_(1, label_C1, torch.full_like(lse_C1, -1.0))
            grad_CV.mul_(weights_N[rows, None] * logits_scale)
            grad_CV = grad_CV.to(x_ND.dtype)
            if needs_x:
                torch.mm(grad_CV, weight_VD, out=dx_ND[rows])
            if needs_w:
                dw_VD += grad_CV.T @ x_ND[rows]
        ctx.save_for_backward(dx_ND, dw_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx, dloss, _):
        dx_ND, dw_VD = ctx.saved_tensors
        dx = None if dx_ND is None else dx_ND * dloss.to(dx_ND.dtype)
        dw = None if dw_VD is None else (dw_VD * dloss).to(ctx.weight_dtype)
        return dx, dw, None, None, None


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, weights_N: Tensor, logits_scale: float
) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies of softmax(logits_scale * x @ weight.T) against labels.

    x_ND, weight_VD: fp32 or bf16; labels_N: int64 in [0, V); weights_N: fp32, what each token counts (0 for
    padding, 1/(batch * seq_len) for the published normalisation). Softmax and losses in fp32.
    Returns (loss, nll_N): the differentiable scalar, and each token's loss in nats, fp32, without gradient.
    """
    return _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N, weights_N, logits_scale)
